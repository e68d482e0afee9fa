"""Layers and depth: norm strategies, the decoder, its initialisation, its exchange with Hugging Face."""
