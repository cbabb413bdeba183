"""What a user types: one file for each group of commands, each of which imports its work when it runs."""
