"""What Triton's compiler makes of each kernel for a GPU that need not be there, as a line of JSON each.

    python compiled.py 90 bf16 128 64 plain      # compute capability, dtype, head dim, key block, what is given

In a process of its own, without TRITON_INTERPRET: kernels are recorded as they would be launched, then compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.triton import call, tables
from lightsparse.patterns import BlockLayout, LocalWindow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_SHORT |= {torch.int32: "i32", torch.int64: "i64"}
KERNELS = {
    call: [
        *("rows_forward", "rows_backward", "columns_forward", "columns_backward"),
        *("merge_outputs", "merge_query_gradients", "add_segments"),
    ],
    tables: ["_rank_in_chunk", "_place"],
}


class Recorder:
    """Stands in for a kernel: notes what it would be launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*given: Any, **named: Any) -> None:
            self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, given, strict=False)) | named))

        return launch


def launches(capability: int, dtype: torch.dtype, dim: int, block: int, given: str) -> list[tuple[Any, dict[str, Any]]]:
    """Of forward and backward of tiles and of rows of single queries.

    given  plain; documents; extras: documents, a block bias and dropout
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    for module, names in KERNELS.items():
        for name in names:
            kernel = getattr(module, name)
            setattr(module, name, Recorder(kernel, found))
    call._capability = lambda device: capability
    n, (heads, kv_heads) = 2 * block, (4, 2)
    q, k, v = (torch.empty(1, h, n, dim, dtype=dtype, device="meta") for h in (heads, kv_heads, kv_heads))
    ids = torch.zeros(1, n, dtype=torch.int32)
    ids[:, n // 2 :] = 1
    tiles = LocalWindow(n).layout(
        n, block=block, heads=heads, kv_heads=kv_heads, documents=None if given == "plain" else ids
    )
    for layout in (on_meta(tiles), on_meta(tiles.per_token(0, n))):
        bias = q.new_empty(1, heads, *layout.kv_indices.shape[2:], dtype=torch.float32) if given == "extras" else None
        dropout = Dropout(0.1, torch.empty(1, dtype=torch.int64, device="meta")) if given == "extras" else None
        out, lse = call.forward(q, k, v, layout, 0.1, bias, dropout)
        call.backward(out, None, out, lse, q, k, v, layout, 0.1, bias, dropout)
    return found


def on_meta(layout: BlockLayout) -> BlockLayout:
    """The layout without its values: who read one would fail, as on a GPU the host would wait."""
    mask, names = layout.mask, ("q_pos", "visible_from", "visible_until", "q_doc", "kv_doc")
    values = {name: value.to("meta") for name in names if (value := getattr(mask, name)) is not None}
    table, dense_rows = layout.kv_indices.to("meta"), layout.dense_rows.to("meta")
    return replace(layout, kv_indices=table, mask=replace(mask, **values), dense_rows=dense_rows)


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> dict[str, Any]:
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _SHORT[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    # As at a launch: pointers of tensors are aligned, and what divides by 16 is told.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(kernel.params)
        if isinstance(arguments[parameter.name], torch.Tensor) and not parameter.is_constexpr
    }
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(result.asm["cubin"])
    sizes = {name: arguments[name] for name in ("BLOCK_M", "BLOCK_N", "WITH_DQ") if name in arguments}
    return {"kernel": str(kernel.__name__), **sizes, **options, "shared": result.metadata.shared, **usage}


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main(capability: int, dtype: str, dim: int, block: int, given: str) -> None:
    seen = set()
    for kernel, arguments in launches(capability // 10, DTYPES[dtype], dim, block, given):
        row = compiled(kernel, arguments, capability)
        if (line := json.dumps(row)) not in seen:
            seen.add(line)
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
