"""Tokens: corpora, tokenizers, preparation, order, streaming, the LightningDataModule."""
