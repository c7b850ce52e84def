"""What can be known before a step is taken: refusals, memory, time, disk."""
