"""Evaluation of a trained decoder: perplexity, exact match, lm-evaluation-harness, sampling."""
