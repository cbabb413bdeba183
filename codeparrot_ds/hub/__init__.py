"""Branches of checkpoints: a local git repository or the Hugging Face Hub, behind a queue on disk."""
