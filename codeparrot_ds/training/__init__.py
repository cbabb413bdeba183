"""One run on one rank: set-up, loop, resume, evaluation, checkpoints, bad steps, stopping."""
