"""What every floor may use: files, hashes, the machine, memory, words for numbers."""
