"""How much of a pass is attention itself: the time inside the attention kernels' operators, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightsparse.utils.compat.torch import TorchDispatchMode


class _KernelTime(TorchDispatchMode):
    """Adds up the seconds of `lightsparse::…` operators and of PyTorch's fused attention; what they call is in them."""

    seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "lightsparse" and "scaled_dot_product" not in function.name():
            return function(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - start
        return result


def kernel_seconds(call: Callable[[], object]) -> float:
    """Runs the call on the CPU and returns the seconds that it spends in attention kernels.

    Watching slows everything else down, a few µs per operator; take the time of the whole from another run.
    """
    with _KernelTime() as watch:
        call()
    return watch.seconds
