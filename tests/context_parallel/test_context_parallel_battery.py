"""A sequence over 2 and 4 ranks gives what one rank gives: outputs, gradients, choices, whatever split and exchange."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from battery import Shape, Variant, close, documents_at, variants
from rank_processes import RankFailureError, RankPool, pool_fixture
from shared_sequence import Case, share, whole

from lightsparse.attention.core import SequenceContext
from lightsparse.context_parallel import attend
from lightsparse.context_parallel.exchange import Fetch
from lightsparse.context_parallel.shard import ContextShard
from lightsparse.context_parallel.split import split
from lightsparse.patterns import BigBird, GlobalTokens, LocalWindow

two = pool_fixture(2)
four = pool_fixture(4)

pytestmark = pytest.mark.multiprocess

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
    "auto takes the ring": Case(exchange="auto", most_shares=0.5, kind="head_tail", borders=(100,)),
    "fp32": Case(precision="float32", kind="head_tail"),
    "recomputed after an evaluation": Case(checkpoint=True, evaluated=True, borders=(90,), dropout=0.3, training=True),
}
# What one variant alone can do.
SPECIAL = {
    "sliding_window": {
        "a learned sink": Case(fields=(("learned_sink", True),), kind="head_tail", borders=(37, 160)),
        "a learned sink, ring": Case(fields=(("learned_sink", True),), exchange="ring", borders=(100,)),
    },
    "big_bird": {"random blocks per head": Case(fields=(("per_head", True),), kind="head_tail")},
    "dilated": {
        "a segment length per group of heads": Case(
            Shape(333, 2, 6, 3, 16), fields=(("branches", "partition"),), borders=(100,), kind="head_tail"
        ),
        "under a pattern": Case(fields=(("pattern", LocalWindow(40) | GlobalTokens(5)),), borders=(100,)),
    },
    "dense": {"under a pattern": Case(fields=(("pattern", BigBird(32, 8, 2, seed=1)), ("block", 16)))},
    "dsa": {
        "dense warm-up": Case(fields=(("dense_steps", -1),), kind="head_tail", borders=(37, 160)),
        "keys gathered for each query": Case(fields=(("top_k", 2),), borders=(100,)),
    },
    "adaptive": {"one choice for all heads": Case(fields=(("shared", True),), training=True, kind="head_tail")},
    "nsa": {
        "keys of its own per branch": Case(fields=(("branch_kv", "own"),), borders=(37, 160), kind="head_tail"),
        "means": Case(fields=(("compress", "mean"),), training=True, dropout=0.3, kind="balanced"),
    },
    "hierarchical": {
        "blocks selected": Case(fields=(("reduce", None), ("levels", ((20, 1), (None, 3))), ("log_count", False)))
    },
}


def cases():
    for variant in variants():
        for name, case in (CASES | SPECIAL.get(variant.name, {})).items():
            core_class = variant.core_class
            if not case.causal and not core_class.supports_bidirectional:
                continue
            exchanges = variant.core(case.shape).context_parallel
            if not exchanges or (case.exchange != "auto" and case.exchange not in exchanges):
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


@pytest.mark.parametrize(
    "variant",
    [variant for variant in variants() if variant.core(Shape()).context_parallel],
    ids=lambda variant: variant.name,
)
def test_two_sequences_over_two_ranks_each_stay_apart(variant: Variant, four: RankPool) -> None:
    case = Case(kind="head_tail", borders=(150,))
    right, found = whole(variant, case), four.run(share, variant, case, 2)
    _compare(right, found[:2], 1e-9)
    _compare(right, found[2:], 1e-9)


def test_sparse_sends_each_key_once_and_only_where_it_is_read(two: RankPool) -> None:
    """A window of 21 tokens in blocks of 16 reaches two blocks back, and the sinks' block is one more."""
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
            rows = (of_rank["tokens"] // block).unique()
            assert torch.equal(of_rank["choice"], right["choice"][:, :, rows]), "the chosen blocks differ"


def test_a_ring_is_refused_where_blocks_have_no_single_owner(two: RankPool) -> None:
    variant = next(variant for variant in variants() if variant.name == "hierarchical")
    with pytest.raises(RankFailureError, match=r"strategy.key_exchange is ring, which this attention cannot use; use "):
        two.run(share, variant, Case(exchange="ring"))


def test_a_sequence_that_was_not_cut_is_refused(two: RankPool) -> None:
    assert two.run(_uncut) == ["k has 320 tokens; this rank holds 160 of the sequence's 320: cut them out with "] * 2


def _uncut(rank: int, world: int) -> str:
    core = next(variant for variant in variants() if variant.name == "sliding_window").core(Shape(320))
    shard = ContextShard(split("contiguous", 320, core.split_granularity(), world), dist.group.WORLD)
    q, k, v = torch.zeros(1, 4, 320, 32), torch.zeros(1, 2, 320, 32), torch.zeros(1, 2, 320, 32)
    with pytest.raises(ValueError) as refused:
        core(q, k, v, x=q, ctx=SequenceContext(torch.arange(320)[None], shard=shard))
    return str(refused.value).removesuffix("shard.take")


def test_an_unknown_exchange_is_refused() -> None:
    with pytest.raises(ValueError, match=r"key_exchange is 'Ring'; it must be one of auto, sparse, ring, gather"):
        ContextShard(split("contiguous", 64, 16, 2), None, "Ring")  # type: ignore[arg-type]


def test_steps_leave_nothing_behind(two: RankPool) -> None:
    """Without the garbage collector: keys that were fetched die with their step, and plans do not grow in number."""
    assert two.run(_steps) == [(0, True)] * 2


def _steps(rank: int, world: int) -> tuple[int, bool]:
    core = next(variant for variant in variants() if variant.name == "sliding_window").core(Shape(320))
    shard = ContextShard(split("contiguous", 320, core.split_granularity(), world), dist.group.WORLD)
    tables, plans = [], []

    class Watched(Fetch):
        def __init__(self, plan, table, *given):
            tables.append(weakref.ref(table))
            super().__init__(plan, table, *given)

    attend.Fetch = Watched
    gc.disable()
    for _ in range(3):
        q, k, v = (torch.randn(1, heads, 160, 32, requires_grad=True) for heads in (4, 2, 2))
        ctx = SequenceContext(shard.tokens[None], documents_at(320, 100), shard=shard)
        core(q, k, v, x=q, ctx=ctx).out.sum().backward()
        del ctx, q, k, v
        plans.append(len(shard.plans))
    gc.enable()
    attend.Fetch = Fetch
    assert len(tables) == 3
    return sum(table() is not None for table in tables), len(set(plans)) == 1
