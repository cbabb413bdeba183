"""Several DeepSpeed configs on the same weights and rows: candidates, trials, findings, verdict, pages."""
