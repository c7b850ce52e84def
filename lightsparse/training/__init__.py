"""From a checked config to a trained model in a run directory. `run.fit` is the whole of it, read from there.

`module` is the loss and its gradients, `recorder` the rows of metrics, `directory` and `checkpoint` what survives a
kill; `objectives`, `optimizers`, `schedules` are what a config chooses between.
"""

import os

# Threads that spin while they wait for each other stand still as soon as anybody else uses a core: the default model on
# two cores, one of them busy, took 15 s a step. Threads that sleep at once need 2.2 s on idle cores, where spinning
# needs 1.1 s; a short spin has both. GNU's OpenMP reads this when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
