"""LongNet's segments, gathered at a dilation rate."""
