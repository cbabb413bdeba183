"""Publishing checkpoints as commits of a branch: a local git repository or the Hugging Face Hub, behind a queue."""
