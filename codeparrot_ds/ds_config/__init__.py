"""DeepSpeed JSON files: read, resolve, check."""
