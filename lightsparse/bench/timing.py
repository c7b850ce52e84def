"""Timing that survives a noisy machine: contenders take turns in one process and are compared within each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Lap:
    wall: float  # seconds by the clock
    cpu: float  # seconds of CPU time of the whole process, all threads; other processes do not count


_CPU = torch.device("cpu")


def alternate(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device = _CPU
) -> dict[str, list[Lap]]:
    """Every contender once per round, in an order that turns round each time; one untimed call of each comes first.

    A lap ends when `device` has done its work.
    Returns a list of `rounds` laps for each name. Raises ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"repeats is {rounds}; it counts timed rounds and must be at least 1")
    for call in contenders.values():
        call()
    _finish(device)
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            _finish(device)
            laps[name].append(Lap(time.perf_counter() - wall, time.process_time() - cpu))
    return laps


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(laps: list[Lap]) -> float:
    return statistics.median(lap.wall for lap in laps) * 1e3


def speedup(laps: list[Lap], baseline: list[Lap]) -> float:
    """How many times faster than the baseline, by the clock: the median over rounds of the ratio within the round."""
    return statistics.median(b.wall / a.wall for a, b in zip(laps, baseline, strict=True))


def cpu_speedup(laps: list[Lap], baseline: list[Lap]) -> float:
    """The same ratio in CPU time. With one thread, other load on the machine does not enter it."""
    return statistics.median(b.cpu / max(a.cpu, 1e-9) for a, b in zip(laps, baseline, strict=True))


@contextmanager
def runtime(threads: int, matmul_precision: str) -> Iterator[None]:
    """PyTorch's thread count and fp32 matmul precision for a while: both sides of a comparison run under the same."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
