"""The weights with which a ring merges what its hops have found sum to one, however large the scores."""

from __future__ import annotations

from typing import Any

import torch

from lightsparse.context_parallel import ring
from lightsparse.context_parallel.ring import RingPlan, ring_attention
from lightsparse.patterns import LocalWindow


def test_hops_of_equal_scores_weigh_alike_and_together_one(monkeypatch: Any) -> None:
    """The same keys come twice, in one process."""
    monkeypatch.setattr(ring, "_passing", lambda own, plan, shard: [(0, own), (1, own)])
    monkeypatch.setattr(ring, "_sent", lambda x, shard, by, shape, what: x)
    layout, ids = LocalWindow(32).layout(32, block=8, causal=False), torch.arange(32)
    q = torch.full((1, 2, 32, 16), 133120.0, requires_grad=True)
    k = q.detach().clone().requires_grad_()
    v = torch.ones_like(k, requires_grad=True)
    out, _ = ring_attention(q, k, v, RingPlan([layout, layout], [ids, ids], 2), None)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)
    out.sum().backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=5e-5, atol=0)
