"""What a trained decoder scores: perplexity, exact match, lm-evaluation-harness, sampling."""
