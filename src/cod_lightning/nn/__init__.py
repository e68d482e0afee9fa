"""Layers and depth: norm strategies, the decoder, its initialisation."""
