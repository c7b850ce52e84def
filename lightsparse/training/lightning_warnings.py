"""Keep Lightning's tips off the screen, by name, so that the few lines of ours are read and real warnings are seen."""

from __future__ import annotations

import logging
import warnings

from lightsparse.utils.compat.lightning import LOGGERS, TIPS
from lightsparse.utils.compat.torch import FSDP_VIEW


def quiet_lightning() -> None:
    """Lightning reports warnings and errors only, and the known tips not at all."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (*TIPS, FSDP_VIEW):  # nothing of ours writes into a layer's output
        warnings.filterwarnings("ignore", message=message)
