"""One file per verb of the command line: words in, lines out. What they do lies in the floors below."""
