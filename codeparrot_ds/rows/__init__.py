"""Files of rows: known by name and first bytes, and read one row after another, the same for every reader."""
