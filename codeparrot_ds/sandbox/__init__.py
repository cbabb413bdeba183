"""Programs that a model wrote, run apart from their tests and from everything else."""
