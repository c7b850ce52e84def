"""The distributed class by itself: equal to one rank, balanced, and clear about what it needs."""

from __future__ import annotations

import pytest
import torch
from rank_processes import RankPool, pool_fixture
from torch import Tensor

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape
from lightsparse.attention.modules.distributed import BlockSparseRingDistributedDilatedAttention
from lightsparse.patterns import LocalWindow

three = pool_fixture(3)

LENGTH = 301
CONFIG = BlockSparseConfig(
    block=16, segment_lengths=(64, 128), dilation_rates=(1, 2), pattern={"near": LocalWindow(LENGTH)}
)
SHAPE = AttentionShape(4, 2, 16, 64)


def _inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, LENGTH, 16, generator=g, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def on_rank(rank: int, world: int, kind: str, exchange: str) -> dict[str, object]:
    core = BlockSparseRingDistributedDilatedAttention(CONFIG, SHAPE, length=LENGTH, kind=kind, exchange=exchange)
    q, k, v, weights = (core.shard.take(t, 2) for t in _inputs())
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = core(*inputs)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    return {"tokens": core.shard.tokens, "all": [out.detach(), *grads], "imbalance": core.imbalance}


@pytest.mark.multiprocess
@pytest.mark.parametrize("exchange", ["sparse", "ring", "gather"])
def test_three_ranks_equal_one_and_are_evenly_loaded(three: RankPool, exchange: str) -> None:
    *inputs, weights = _inputs()
    inputs = [t.requires_grad_() for t in inputs]
    core = BlockSparseRingDilatedAttention(CONFIG, SHAPE)
    out = core(*inputs)
    right = [out, *torch.autograd.grad((out * weights).sum(), inputs)]

    found = three.run(on_rank, "balanced", exchange)
    order = torch.cat([of_rank["tokens"] for of_rank in found]).argsort()
    for i, expected in enumerate(right):
        joined = torch.cat([of_rank["all"][i] for of_rank in found], 2)[:, :, order]
        torch.testing.assert_close(joined, expected, rtol=0, atol=1e-9)
    uneven = three.run(on_rank, "contiguous", exchange)[0]["imbalance"]
    assert found[0]["imbalance"] < 1.1 < 1.5 < uneven


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"needs a process group; start the ranks with torchrun"):
        BlockSparseRingDistributedDilatedAttention(CONFIG, SHAPE, length=LENGTH)
