"""From words on a command line to a checked config: compose, parse, build; and what names a run."""
