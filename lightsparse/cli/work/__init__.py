"""What the commands do once their words are right, where that is more than a few lines. From here on torch is there."""
