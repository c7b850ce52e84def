"""One file per verb of the command line: words in, lines out, no torch. What a verb does lies in `work` and below."""
