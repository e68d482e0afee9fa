"""Evaluation of a trained decoder: perplexity, exact match, lm-evaluation-harness, sampling."""

SCORES_FILE = "tasks.json"
"""File in a run folder with the scores of whole tasks of `lm_eval`."""

PAPER_TASKS = ("mmlu", "boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande")
"""The columns of Table 2, in its order, by their names in the harness."""
