"""Evaluation of a trained decoder: perplexity, exact match, lm-evaluation-harness, sampling."""

SCORES_FILE = "tasks.json"
"""File in a run folder with the scores of whole tasks of `lm_eval`."""
