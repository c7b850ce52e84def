"""Pictures and numbers about patterns, attention and runs."""
