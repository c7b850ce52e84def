"""Which flash kernels PyTorch's own attention calls on CUDA: FlashAttention 3 or 4 where installed, else its own.

Dense layouts go through `scaled_dot_product_attention`, whose built-in flash kernel is FlashAttention 2.
`torch.nn.attention` lists newer ones (FA3, Shah et al. 2024, arXiv 2407.08608; FA4) and puts one in its place for the
whole process; the kernels themselves are packages of their own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlashKernel:
    name: str  # in torch.nn.attention
    module: str  # that PyTorch imports to activate it
    capabilities: tuple[int, ...]  # major compute capabilities of the GPUs it is written for

    def obstacle(self) -> str | None:
        """What keeps it from being used here, or None."""
        if self.name not in list_flash_attention_impls():
            listed = ", ".join(list_flash_attention_impls()) or "none"
            return f"PyTorch {torch.__version__} does not list {self.name} (it lists {listed})"
        if not torch.cuda.is_available():
            return f"{self.name} runs on CUDA only and there is no CUDA device here"
        major, minor = torch.cuda.get_device_capability()
        if major not in self.capabilities:
            wanted = " or ".join(f"{c}.x" for c in self.capabilities)
            return f"{self.name} needs a GPU of compute capability {wanted} and this one has {major}.{minor}"
        if not _is_installed(self.module):
            return f"{self.name} needs the Python module {self.module}, which is not installed"
        return None


KERNELS = {
    "fa3": FlashKernel("FA3", "flash_attn_interface", (9,)),
    "fa4": FlashKernel("FA4", "flash_attn.cute.interface", (9, 10)),
}
_choice = "nothing was chosen yet"


def activate(choice: str = "auto") -> str:
    """Put the chosen flash kernels in place for the whole process; logs and returns one line on what and why.

    choice  auto = the first of fa3, fa4 that can be used here, else PyTorch's own; fa3; fa4; none = PyTorch's own
    Raises ValueError where fa3 or fa4 is asked for by name and cannot be used.
    """
    global _choice
    if choice not in ("auto", "none", *KERNELS):
        raise ValueError(f"kernels.flash is {choice!r}; choose auto, {', '.join(KERNELS)}, none")
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    if choice == "none":
        _choice = "chosen by kernels.flash=none"
    elif choice == "auto" and not torch.cuda.is_available():
        _choice = "FA3 and FA4 need CUDA"
    else:
        obstacles: list[str] = []
        for name in KERNELS if choice == "auto" else [choice]:
            reason = _try(KERNELS[name])
            if reason is None:
                obstacles.clear()
                break
            obstacles.append(reason)
        if obstacles and choice != "auto":
            raise ValueError(f"kernels.flash is {choice}; {obstacles[0]}; use kernels.flash=auto or none")
        _choice = "; ".join(obstacles) or f"chosen by kernels.flash={choice}"
    log.log(logging.INFO if torch.cuda.is_available() else logging.DEBUG, "%s", describe())
    return describe()


def describe() -> str:
    """The flash kernels in place and why, in one line."""
    return f"flash kernels: {current_flash_attention_impl() or 'those of PyTorch'} ({_choice})"


def _try(kernel: FlashKernel) -> str | None:
    """Activate a kernel; what kept it from that, or None."""
    reason = kernel.obstacle()
    if reason is None:
        try:
            activate_flash_attention_impl(kernel.name)
        except (ImportError, RuntimeError, OSError) as error:  # a package built for another PyTorch or CUDA
            reason = f"{kernel.name} is installed and does not load: {str(error).splitlines()[0]}"
    return reason


def _is_installed(module: str) -> bool:
    """Whether a dotted module can be found, without importing it (only the packages around it)."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
