"""What a run writes about itself: rows of metrics, progress, plots, samples, the summary."""
