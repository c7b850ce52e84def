"""Summaries of keys: block means, pooled levels, compressed entries."""
