"""What a run leaves on disk: its folder, checkpoints and their exports, imports of DeepSpeed's own."""
