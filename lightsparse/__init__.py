"""lightsparse: train long-context transformers with exact sparse attention."""

import os

__version__ = "0.2.0"

# Threads that spin while they wait for each other stand still as soon as anybody else uses a core, and the compiled
# attention kernel has threads of its own: the default model on two cores, one of them busy, took 15 s a step. Threads
# that sleep at once need 2.2 s on idle cores, where spinning needs 1.1 s; a short spin has both. GNU's OpenMP reads
# this when torch loads, so it counts where lightsparse is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
