"""What survives the end of a process: checkpoints, the run directory and its lock, and reading a run back."""
