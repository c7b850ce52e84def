"""From a checked config to a trained model in a run directory. `run.fit` is the whole of it, read from there.

`module` is the loss and its gradients, `recorder` the rows of metrics, `directory` and `checkpoint` what survives a
kill; `objectives`, `optimizers`, `schedules` are what a config chooses between.
"""

from lightsparse.utils.compat.torchmetrics import import_torchmetrics

import_torchmetrics()  # before anything in here imports Lightning, which would import it with all that it can use
