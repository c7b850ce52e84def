"""Out of memory, or nearly: one sentence with the estimate and with settings that would fit."""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training.preflight.estimate import Estimate, remedies
from lightsparse.utils.allocator import keep_freed
from lightsparse.utils.compat.torch import OUT_OF_MEMORY
from lightsparse.utils.text import size

log = logging.getLogger(__name__)

_CGROUPS = (  # limit and use of a container's memory, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_ALARM = 2.0  # an estimate above so many times the memory gets a warning
_ROOM = 2.0  # an estimate that the free memory holds so many times lets the run keep what it frees
_SMALLER = 0.7  # what ran out of memory is proposed again only at this share of its estimate
_PINNED = 0.8  # share of the free main memory that layers may take: what is pinned is lost to everything else


class MemoryShortError(RuntimeError):
    """The run does not fit in memory; the sentence says what would."""


def memory_per_rank(config: Config) -> tuple[int, int]:
    """(bytes in all, bytes free now) for one rank: of its GPU, or its share of what this process may use here."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total, free
    return main_memory_per_rank(config)


def main_memory_per_rank(config: Config) -> tuple[int, int]:
    """(bytes in all, bytes free now) of main memory for one rank: its share of what this process may use here."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _CGROUPS:
        text = Path(limit).read_text().strip() if Path(limit).is_file() else "max"
        if text != "max" and int(text) < total:
            total = int(text)
            free = min(free, total - int(Path(used).read_text()))
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY and addresses < total:
        total = addresses
        free = min(free, addresses - psutil.Process().memory_info().vms)
    return total // config.trainer.devices, max(free, 0) // config.trainer.devices


def check_memory(config: Config) -> None:
    """Refuse what cannot fit by any reckoning, before anything is computed.

    Raises ConfigError where the residual stream of one micro-batch, which every run holds at least, is larger than the
    memory of this machine: its layout alone would take long to compute. Likewise where model.activation_checkpointing
    is offload and the streams of the layers are larger than the main memory beside a GPU.
    """
    total, _ = memory_per_rank(config)
    tokens = config.data.batch_size * config.data.context // config.grid.context
    least = tokens * config.model.widths.embed_dim * (2 if config.precision == "bf16-true" else 4)
    if least > total:
        raise ConfigError(
            f"data.context is {config.data.context}; one micro-batch of data.batch_size={config.data.batch_size} takes "
            f"at least {size(least)} and {_machine_name()} has {size(total)}; lower data.context or use "
            "strategy=context over more machines"
        )
    main_memory = main_memory_per_rank(config)[0]
    if config.model.activation_checkpointing == "offload" and (config.model.depth - 1) * least > main_memory:
        raise ConfigError(
            f"model.activation_checkpointing is offload; the inputs of {config.model.depth - 1} layers take at least "
            f"{size((config.model.depth - 1) * least)} and the main memory has {size(main_memory)} per rank; lower "
            "data.batch_size or data.context"
        )


def room_for_layers(config: Config) -> float:
    """Bytes of main memory per rank that layers may take now, with offload; 0 on a CPU."""
    return _PINNED * main_memory_per_rank(config)[1] if torch.cuda.is_available() else 0.0


def warn_of_memory(config: Config, needed: Estimate) -> None:
    """A warning where the estimate is far above the memory; no refusal, since it is an estimate."""
    total, _ = memory_per_rank(config)
    main_memory = main_memory_per_rank(config)[0]
    if needed.main_memory > main_memory:
        log.warning(
            "THIS WILL PROBABLY NOT FIT: it takes about %s, and the main memory has %s; %s",
            needed, size(main_memory), ways_out(config, 0.9 * total),
        )  # fmt: skip
        return
    if needed.total > _ALARM * total:
        log.warning(
            "THIS WILL PROBABLY NOT FIT: it takes about %s and %s has %s; %s",
            needed, _machine_name(), size(total), ways_out(config, 0.9 * total),
        )  # fmt: skip


def keep_freed_where_there_is_room(config: Config, needed: Estimate) -> bool:
    """Have this process make tensors of what it frees, unless memory is short or they are on a GPU: whether it does."""
    _, free = memory_per_rank(config)
    return not torch.cuda.is_available() and _ROOM * needed.total <= free and keep_freed()


@contextmanager
def memory_named(config: Config, needed: Estimate) -> Iterator[None]:
    """Turn an allocation that fails within into a MemoryShortError with the estimate and what would fit."""
    total, free = memory_per_rank(config)
    room = room_for_layers(config)  # now: what the run takes of it is free again in the next
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        budget = min(free, needed.process + _SMALLER * (needed.total - needed.process))
        beside = ""
        if needed.main_memory:  # either may have run out
            beside = f", beside {size(room / _PINNED)} of main memory"
            room = min(room, _SMALLER * needed.main_memory)
        ways = ways_out(config, budget, room)
        raise MemoryShortError(
            f"out of memory: this run takes about {needed}, and {size(free)} of {size(total)} on {_machine_name()} "
            f"were free when it started{beside}; {ways}"
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a failed allocation: torch has a type for CUDA's alone."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        text = str(error)
        if isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def ways_out(config: Config, budget: float, room: float | None = None) -> str:
    """Three settings that would fit in `budget` bytes per rank, in words.

    room  bytes of main memory per rank beside a GPU for what layers keep; None = `room_for_layers`
    """
    several = torch.cuda.is_available() and torch.cuda.device_count() >= 2 * config.trainer.devices
    room = room_for_layers(config) if room is None else room
    settings = remedies(config, budget, several_devices=several, main_memory=room)
    if not settings:
        return f"no setting of this model fits in {size(budget)}; use a smaller model or another machine"
    return "set " + ", or ".join(f"{words} (about {_taken(needed)})" for words, needed in settings)


def _taken(needed: Estimate) -> str:
    beside = f" and {size(needed.main_memory)} of main memory" if needed.main_memory else ""
    return size(needed.total) + beside


def _machine_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine"
