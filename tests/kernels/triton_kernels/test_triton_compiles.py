"""Each entry of the table of tile sizes compiles for its GPU, without one: it fits and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may have
KERNELS = {"rows_forward", "rows_backward", "columns_forward", "columns_backward", "add_segments", "merge_outputs"}
KERNELS |= {"merge_query_gradients", "_rank_in_chunk", "_place"}
SLOW = [pytest.param(given, marks=pytest.mark.slow) for given in ("plain", "documents")]


@pytest.mark.multiprocess
@pytest.mark.parametrize("given", ["extras", *SLOW])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp32")])
def test_tile_sizes_fit_and_spill_nothing(capability, dtype, dim, given):
    command = [
        sys.executable,
        str(Path(__file__).with_name("compiled.py")),
        str(capability),
        dtype,
        str(dim),
        "64",
        given,
    ]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[3])
    done = subprocess.run(command, env=environment | {"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in found} == KERNELS
    assert [row for row in found if row["stack"] or row["shared"] > SHARED[capability]] == []
