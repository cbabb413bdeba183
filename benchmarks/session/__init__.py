"""Parts of gpu_session.py: the list of items, the ranks that measure, what they measure, and the record's text."""
