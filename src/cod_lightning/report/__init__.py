"""Tables: run records and published figures, side by side."""
