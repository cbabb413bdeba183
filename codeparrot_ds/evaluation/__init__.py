"""Judging a model: perplexity, completions, problems that it solves, contamination of its corpus."""
