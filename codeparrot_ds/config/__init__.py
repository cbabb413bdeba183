"""The run config: its fields, files and options. Importing it imports neither torch nor PyYAML."""
