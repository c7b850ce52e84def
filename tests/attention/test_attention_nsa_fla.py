"""NSA against flash-linear-attention's naive reference, forward and gradients, in fp32.

The reference averages blocks of one size (l = d = l') and has the paper's forced blocks; its window needs CUDA.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.metadata import distribution

import pytest
import torch
from battery import Inputs, Shape, close, context, gradients
from nsa_case import as_map, make, only, run

ONE_SIZE = {"compress": "mean", "compress_block": 16, "compress_stride": 16, "select_block": 16}


def mean_pooling(x: torch.Tensor, size: int, cu_seqlens: None = None) -> torch.Tensor:
    """Of whole blocks of [B, T, H, D]; the package's own needs Triton."""
    return x.unflatten(1, (-1, size)).mean(2)


@pytest.fixture
def fla(monkeypatch):
    """fla/ops/nsa/naive.py alone, by its path: importing the package would need Triton."""
    for name, contents in {
        "fla.ops.utils": {"prepare_chunk_offsets": None},  # for packed documents only
        "fla.ops.utils.pooling": {"mean_pooling": mean_pooling},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    path = distribution("fla-core").locate_file("fla/ops/nsa/naive.py")
    spec = importlib.util.spec_from_file_location("fla_nsa_naive", str(path))
    module = importlib.util.module_from_spec(spec)
    with pytest.warns(ImportWarning, match="Flash Attention"):
        spec.loader.exec_module(module)
    return module


def theirs(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, H, N, D] → [B, N, H, D]"""
    return [t.transpose(1, 2) for t in tensors]


def same(found: torch.Tensor, right: torch.Tensor, *of: torch.Tensor) -> None:
    close(found, right, 1e-5, "the output")
    for i, (grad, expected) in enumerate(zip(gradients(found, *of), gradients(right, *of), strict=True)):
        close(grad, expected, 1e-5, f"gradient {i}")


@pytest.mark.parametrize("shape", [Shape(64, 2, 4, 2, 16), Shape(96, 1, 4, 1, 32)], ids=str)
def test_the_selected_branch_equals_theirs_for_our_choice(fla, shape):
    core, given = only(make(shape), "selected"), Inputs.random(shape).leaves()
    ctx = context(shape.n)
    keys = core.summaries(given.k, given.v, given.x, shape.n, ctx).k
    table = core.choose(given.q, keys, torch.arange(shape.n), shape.n, ctx).transpose(1, 2).long()
    # In theirs an entry of −1 is a block before the sequence, which is masked.
    right = fla.naive_nsa_selection(*theirs(given.q, given.k, given.v), table, 16).transpose(1, 2)
    same(run(core, given).out, right, given.q, given.k, given.v)


@pytest.mark.parametrize("shape", [Shape(64, 2, 4, 2, 16), Shape(160, 1, 8, 1, 32)], ids=str)
def test_the_compressed_branch_equals_theirs(fla, shape):
    core, given = only(make(shape, **ONE_SIZE), "compressed"), Inputs.random(shape).leaves()
    q, k, v = theirs(given.q, given.k, given.v)
    right, _ = fla.naive_nsa_compression(q, mean_pooling(k, 16), mean_pooling(v, 16), 16, shape.dim**-0.5)
    same(run(core, given).out, right.transpose(1, 2), given.q, given.k, given.v)


@pytest.mark.parametrize("top_n", [3, 5, 9])
def test_the_choice_equals_theirs(fla, top_n):
    shape = Shape(160, 2, 8, 2, 16)
    core, given = make(shape, top_n=top_n, **ONE_SIZE), Inputs.random(shape)
    q, k = theirs(given.q, given.k)
    table = fla.naive_nsa_topk(q, mean_pooling(k, 16), top_n, 16, shape.dim**-0.5).transpose(1, 2)
    ctx = context(shape.n)
    ours = core.choose(given.q, core.summaries(given.k, given.v, given.x, 160, ctx).k, torch.arange(160), 160, ctx)
    assert torch.equal(as_map(ours, 10), as_map(table, 10))


def test_both_branches_under_their_gates_equal_theirs(fla):
    shape = Shape(96, 1, 32, 2, 16)  # theirs wants groups of 16
    core, given = make(shape, top_n=4, **ONE_SIZE), Inputs.random(shape).leaves()
    with torch.no_grad():
        core.gate.bias.view(3, -1)[2] = -torch.inf
    g_compressed, g_selected, _ = (g.transpose(1, 2) for g in core.gate(given.x))
    right = fla.naive_nsa(
        *theirs(given.q, given.k, given.v), g_compressed, g_selected, block_counts=4, block_size=16
    ).transpose(1, 2)
    same(run(core, given).out, right, *given.tensors(), core.gate.weight)
