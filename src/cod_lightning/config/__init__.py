"""The configuration of a run: its schema, validation, composition by Hydra, and saving."""
