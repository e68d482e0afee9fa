"""Reproduction of the paper: experiments, published figures, results, tables, figures and the report."""
