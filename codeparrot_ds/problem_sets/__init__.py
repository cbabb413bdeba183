"""Sets of programming problems: the published schemas, and whether a set's own solutions pass its tests."""
