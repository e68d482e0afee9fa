"""Tables and pages: run records and published figures, and what was measured of several models, side by side."""
