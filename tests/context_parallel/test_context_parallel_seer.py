"""A dense stage over ranks: dense attention and the gate's loss, output and gradients those of one rank."""

from __future__ import annotations

import pytest
import torch
from battery import Variant, close
from rank_processes import RankPool, pool_fixture
from shared_sequence import Case, share, whole

two = pool_fixture(2)

pytestmark = pytest.mark.multiprocess


def test_a_dense_stage_over_two_ranks_teaches_the_gate_what_one_rank_does(two: RankPool) -> None:
    case = Case(fields=(("dense_steps", 1),), training=True, borders=(100,), kind="head_tail")
    right, found = whole(Variant("seer"), case), two.run(share, Variant("seer"), case)
    order = torch.cat([of_rank["tokens"] for of_rank in found]).argsort()
    close(torch.cat([of_rank["out"] for of_rank in found], 2)[:, :, order], right["out"], 1e-9, "the output")
    for i, grad in enumerate(right["parameters"]):
        assert grad.abs().max() > 1e-6
        close(sum(of_rank["parameters"][i] for of_rank in found), grad, 1e-9, "the gradient of the gate")
    for of_rank in found:
        assert set(of_rank["stats"]) == set(right["stats"]) == {"density", "kept_mass", "selection_kl", "uniform_kl"}
        for name, value in right["stats"].items():
            close(of_rank["stats"][name], value, 1e-5, name)
        rows = (of_rank["tokens"] // 16).unique()
        assert torch.equal(of_rank["choice"], right["choice"][:, :, rows])
    assert float(right["stats"]["density"]) == 1
