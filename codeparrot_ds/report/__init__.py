"""Pages and pictures of runs and plans."""
