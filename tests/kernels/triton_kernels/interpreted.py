"""Triton's interpreter for tests: half precision as hardware has it, and every access of every program checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


def as_hardware(patch: pytest.MonkeyPatch) -> None:
    """bf16 is kept as bit patterns, which the interpreter multiplies as integers and cuts off instead of rounding."""
    cast, dot = Builder.cast_impl, Builder.create_dot

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, source, to)

    def exact_dot(self: Any, a: Any, b: Any, sums: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, sums, *others)

    # A third of the time goes into looking for overflows of integers, which the hash of dropout relies on.
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
    patch.setattr(Builder, "cast_impl", rounding_cast)
    patch.setattr(Builder, "create_dot", exact_dot)


class Launch:
    """Accesses of one launch: of each program the addresses that it reads and writes."""

    def __init__(self, name: str, spans: list[tuple[int, int]]):
        self.name = name
        self.starts, self.ends = np.array(sorted(spans), dtype=np.int64).reshape(-1, 2).T
        self.read: list[tuple[tuple[int, ...], np.ndarray]] = []
        self.written: list[tuple[tuple[int, ...], np.ndarray]] = []

    def note(self, to: list[Any], program: tuple[int, ...], pointers: Any, mask: Any) -> None:
        size = max(np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize, 1)
        address = pointers.data.astype(np.int64)[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        span = np.searchsorted(self.starts, address, side="right") - 1
        inside = (span >= 0) & (address + size <= self.ends[np.maximum(span, 0)]) if len(self.starts) else address < 0
        assert inside.all(), f"{self.name}, program {program}: {int((~inside).sum())} accesses outside every tensor"
        to.append((program, address))

    def check(self) -> None:
        writers: dict[int, tuple[int, ...]] = {}
        for program, addresses in self.written:
            for address in addresses.ravel().tolist():
                assert address not in writers, f"{self.name}: {writers[address]} and {program} write one address"
                writers[address] = program
        for program, addresses in self.read:
            for address in np.intersect1d(addresses, np.fromiter(writers, np.int64, len(writers))).tolist():
                assert writers[address] == program, f"{self.name}: {program} reads what {writers[address]} writes"


@contextmanager
def guarded() -> Iterator[list[Launch]]:
    """Every access inside a tensor, no address written twice, none read that another program writes: else it raises."""
    launches: list[Launch] = []
    load, store, call = Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__

    def noting(function: Callable[..., Any], which: str) -> Callable[..., Any]:
        def noted(self: Any, pointers: Any, *given: Any) -> Any:
            launch = launches[-1]
            launch.note(getattr(launch, which), tuple(self.grid_idx), pointers, given[0 if which == "read" else 1])
            return function(self, pointers, *given)

        return noted

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors if x.nbytes]
        launches.append(Launch(self.fn.__name__, sorted(set(spans))))
        call(self, *args, **kwargs)
        launches[-1].check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "create_masked_load", noting(load, "read"))
        patch.setattr(Builder, "create_masked_store", noting(store, "written"))
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield launches
