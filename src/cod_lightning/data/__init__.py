"""Tokens and images: corpora, tokenizers, preparation, order, streaming, the LightningDataModules."""
