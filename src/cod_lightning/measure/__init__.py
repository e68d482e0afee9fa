"""Measures of a trained model, layer by layer; they do not depend on training."""
