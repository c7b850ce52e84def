"""From a checked config to a trained model in a run directory. `run.fit` is the whole of it, read from there.

`module` is the loss and its gradients, `measures` what it reports, `metrics` what is written of it, `checkpoints` what
survives a kill, `preflight` what is looked at before, `endings` how a process ends.
"""

from lightsparse.utils.compat.torchmetrics import import_torchmetrics

import_torchmetrics()  # before anything in here imports Lightning, which would import it with all that it can use
