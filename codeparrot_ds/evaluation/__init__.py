"""Evaluating a model: perplexity, completions, pass@k on programming problems, contamination of its corpus."""
