"""A sequence over 2 and 4 ranks gives what one rank gives: outputs, gradients, choices, whatever split and exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from battery import Shape, Variant, close, variants
from rank_processes import RankPool, pool_fixture
from shared_sequence import Case, share, whole

two = pool_fixture(2)
four = pool_fixture(4)

pytestmark = pytest.mark.ranks

CASES = {
    "plain": Case(),
    "head-tail": Case(kind="head_tail"),
    "documents": Case(borders=(37, 160, 161, 290), kind="balanced"),
    "both ways": Case(causal=False, borders=(100,), kind="head_tail"),
    "one key head": Case(Shape(450, 1, 8, 1, 32), kind="balanced"),
    "dropout": Case(dropout=0.3, training=True, kind="head_tail", borders=(200,)),
    "gather": Case(exchange="gather", kind="head_tail", borders=(37, 160)),
    "ring": Case(exchange="ring"),
    "ring, documents": Case(exchange="ring", kind="head_tail", borders=(37, 160), dropout=0.3, training=True),
    "ring, both ways": Case(exchange="ring", causal=False),
    "auto": Case(exchange="auto"),
    "fp32": Case(precision="float32", kind="head_tail"),
}


def cases():
    for variant in variants():
        for name, case in CASES.items():
            core_class = variant.core_class
            if not case.causal and not core_class.supports_bidirectional:
                continue
            if case.exchange != "auto" and case.exchange not in variant.core(case.shape).context_parallel:
                continue
            yield pytest.param(variant, case, id=f"{variant.name}-{name}")


@pytest.mark.parametrize(("variant", "case"), list(cases()))
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_equal_one_rank(
    variant: Variant, case: Case, ranks: str, request: pytest.FixtureRequest, battery_result: Callable[[str, str], None]
) -> None:
    battery_result(variant.name, f"equals_one_rank_on_{ranks}")
    pool: RankPool = request.getfixturevalue(ranks)
    _compare(whole(variant, case), pool.run(share, variant, case), 1e-5 if case.precision == "float32" else 1e-9)


@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_two_sequences_over_two_ranks_each_stay_apart(variant: Variant, four: RankPool) -> None:
    case = Case(kind="head_tail", borders=(150,))
    right, found = whole(variant, case), four.run(share, variant, case, 2)
    _compare(right, found[:2], 1e-9)
    _compare(right, found[2:], 1e-9)


def test_sparse_sends_each_key_once_and_only_where_it_is_read(two: RankPool) -> None:
    """A window of 21 tokens in blocks of 16 reaches two blocks back, and the sinks are in block 0, which is one more."""
    variant = next(variant for variant in variants() if variant.name == "sliding_window")
    case = Case(Shape(320, 1, 2, 2, 16))
    first, second = two.run(share, variant, case)
    row = 2 * 2 * 16 * 8  # k and v, heads, dims, fp64
    assert first["sent"]["keys"] == 3 * 16 * row
    assert second["sent"]["keys"] == 0
    assert second["sent"]["key gradients"] == 3 * 16 * row


def _compare(right: dict[str, Any], found: list[dict[str, Any]], tolerance: float) -> None:
    order = torch.cat([of_rank["tokens"] for of_rank in found]).argsort()

    def joined(pieces: list[torch.Tensor], dim: int = 2) -> torch.Tensor:
        return torch.cat(pieces, dim).index_select(dim, order)

    close(joined([of_rank["out"] for of_rank in found]), right["out"], tolerance, "the output")
    for i, name in enumerate("qkv"):
        grad = joined([of_rank["grads"][i] for of_rank in found])
        close(grad, right["grads"][i], tolerance, f"the gradient of {name}")
    for i, grad in enumerate(right["parameters"]):
        total = sum(of_rank["parameters"][i] for of_rank in found)
        close(total, grad, tolerance, f"the gradient of parameter {i}")
    for of_rank in found:
        for name, value in right["stats"].items():
            close(of_rank["stats"][name], value, 1e-5, f"stats[{name!r}]")
        if right["aux_loss"] is not None:
            close(of_rank["aux_loss"], right["aux_loss"], tolerance, "aux_loss")
    if right["choice"] is not None:
        block = -(-right["out"].shape[2] // right["choice"].shape[2])
        for of_rank in found:
            rows = (of_rank["tokens"] // block).unique() if block else None
            assert torch.equal(of_rank["choice"], right["choice"][:, :, rows]), "the chosen blocks differ"


def test_a_ring_is_refused_where_blocks_have_no_single_owner() -> None:
    assert "ring" not in next(v for v in variants() if v.name == "hierarchical").core(Case().shape).context_parallel
    assert replace(Case(), exchange="ring").exchange == "ring"
