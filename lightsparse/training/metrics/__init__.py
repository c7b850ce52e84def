"""What a run writes about itself: rows of metrics, progress, plots, a sample, the summary."""
