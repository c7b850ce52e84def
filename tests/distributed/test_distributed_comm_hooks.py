"""Every hook leaves the mean of the ranks' gradients, or owes the rest; the bytes are those of the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from rank_processes import pool_fixture
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightsparse.distributed.comm_hooks import HookState, TopK, gradient_hook, largest

RANKS = 2
pool = pool_fixture(RANKS, timeout=20)

SHAPES = ((37, 23), (37,), (11, 37), (11,), (1, 5), (3, 4, 7))


class Parts(nn.Module):
    """Parameters whose gradients are whatever is passed in, and are ready in another order than they are listed."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(())
        for index in (3, 0, 5, 2, 4, 1):
            total = total + (self.parts[index] * gradients[index]).sum()
        return total


def gradients_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of one rank at one step; some entries are equal in magnitude."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    return [(torch.randn(shape, generator=draw) * 4).round().div(4).to(dtype) for shape in SHAPES]


def wrapped(name: str, options: dict, dtype: torch.dtype = torch.float32) -> tuple[DistributedDataParallel, HookState]:
    # Buckets of 2 kB: several of them, arranged anew after the first step.
    ddp = DistributedDataParallel(Parts(dtype), bucket_cap_mb=2 / 1024)
    state, hook = gradient_hook(name, **options)
    ddp.register_comm_hook(state, hook)
    return ddp, state


def stepped(ddp: DistributedDataParallel, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What the optimizer would see."""
    ddp.zero_grad()
    ddp(gradients).backward()
    return [p.grad.clone() for p in ddp.module.parts]


def one_run(rank: int, world: int, name: str, options: dict, given: list[list[list[Tensor]]]):
    """The gradients after each step, bytes of each step, and the residuals at the end; given: [step][rank][part]."""
    ddp, state = wrapped(name, options, given[0][0][0].dtype)
    seen, sent = [], []
    for of_rank in given:
        seen.append(stepped(ddp, of_rank[rank]))
        sent.append(state.sent - sum(sent))
    assert state.steps == len(given)
    return seen, sent, state.residual_state(ddp.module.named_parameters())


def given(steps: int, dtype: torch.dtype = torch.float32) -> list[list[list[Tensor]]]:
    return [[gradients_of(rank, step, dtype) for rank in range(RANKS)] for step in range(steps)]


def mean(of_rank: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(part).mean(0) for part in zip(*of_rank, strict=True)]


def reference_topk(given: list[list[list[Tensor]]], share: float) -> list[list[Tensor]]:
    """Algorithm 1 of Stich et al. 2018, entry by entry, on all ranks at once."""
    owed = [[torch.zeros(shape).flatten() for shape in SHAPES] for _ in range(RANKS)]
    means = []
    for of_rank in given:
        sent = [[torch.zeros(shape).flatten() for shape in SHAPES] for _ in range(RANKS)]
        for rank in range(RANKS):
            for part, gradient in enumerate(of_rank[rank]):
                total = owed[rank][part] + gradient.flatten()
                order = sorted(range(len(total)), key=lambda i: (-abs(total[i].item()), i))
                for i in order[: max(1, round(share * len(total)))]:
                    sent[rank][part][i] = total[i]
                owed[rank][part] = total - sent[rank][part]
        means.append([part.view(shape) for part, shape in zip(mean(sent), SHAPES, strict=True)])
    return means


@pytest.mark.multiprocess
@pytest.mark.parametrize("share", [0.003, 0.1, 0.5])
def test_topk_follows_its_definition_through_the_rebuilding_of_buckets(pool, share):
    steps = given(5)
    wanted = reference_topk(steps, share)
    for seen, _, _ in pool.run(one_run, "topk", {"topk_share": share}, steps):
        for step in range(5):
            for got, want in zip(seen[step], wanted[step], strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def bucket_arrangements(rank: int, world: int) -> list[list[list[int]]]:
    """Parameters of each bucket, at each of three steps."""
    ddp, state = wrapped("topk", {"topk_share": 0.1})
    number = {p: index for index, p in enumerate(ddp.module.parts)}
    inner = gradient_hook("topk", topk_share=0.1)[1]
    noted: list[list[list[int]]] = []

    def noting(state, bucket):
        noted[-1].append([number[p] for p in bucket.parameters()])
        return inner(state, bucket)

    ddp = DistributedDataParallel(ddp.module, bucket_cap_mb=2 / 1024)
    ddp.register_comm_hook(state, noting)
    for step in range(3):
        noted.append([])
        stepped(ddp, gradients_of(rank, step))
    return noted


@pytest.mark.multiprocess
def test_ddp_does_arrange_the_buckets_of_these_tests_anew(pool):
    for first, second, third in pool.run(bucket_arrangements):
        assert first != second == third
        assert len(third) > 1 and any(len(bucket) > 1 for bucket in third)
        assert sorted(part for bucket in third for part in bucket) == list(range(len(SHAPES)))


@pytest.mark.multiprocess
def test_topk_of_everything_is_plain_averaging(pool):
    steps = given(3)
    for seen, _, kept in pool.run(one_run, "topk", {"topk_share": 1.0}, steps):
        for got, of_rank in zip(seen, steps, strict=True):
            torch.testing.assert_close(got, mean(of_rank), rtol=1e-6, atol=1e-7)
        assert all(not residual.any() for residual in kept["residuals"].values())


@pytest.mark.multiprocess
def test_bf16_is_the_mean_to_the_rounding_of_bf16(pool):
    draw = torch.Generator().manual_seed(3)
    steps = [[[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(RANKS)] for _ in range(2)]
    for seen, _, _ in pool.run(one_run, "bf16", {}, steps):
        for got, of_rank in zip(seen, steps, strict=True):
            for part, want in enumerate(mean(of_rank)):
                size = torch.stack([of_rank[rank][part].abs() for rank in range(RANKS)]).mean(0)
                assert got[part].dtype == torch.float32
                assert ((got[part] - want).abs() <= 2**-7 * size + 1e-8).all()  # 2⁻⁸ per summand, 2⁻⁸ for the sum
                assert not torch.equal(got[part], want)


OWING = {"topk": {"topk_share": 0.05}, "powersgd": {"powersgd_rank": 1, "powersgd_start": 2}}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", OWING)
def test_what_is_not_applied_is_owed(pool, name):
    steps = given(6)
    ranks = pool.run(one_run, name, OWING[name], steps)
    for index in range(len(SHAPES)):
        put_in = torch.stack([mean(of_rank)[index] for of_rank in steps]).sum(0).flatten()
        applied = torch.stack([step[index] for step in ranks[0][0]]).sum(0).flatten()
        zero = torch.zeros_like(applied)
        owed = torch.stack([kept["residuals"].get(f"parts.{index}", zero) for _, _, kept in ranks]).mean(0)
        torch.testing.assert_close(applied + owed, put_in, rtol=0, atol=1e-5)
    assert sum(residual.abs().sum() for residual in ranks[0][2]["residuals"].values()) > 1


def resumed(rank: int, world: int, name: str, options: dict, given: list[list[list[Tensor]]], at: int):
    """one_run, saved at a step and continued by a new DDP module and a new state."""
    ddp, state = wrapped(name, options)
    seen = [stepped(ddp, of_rank[rank]) for of_rank in given[:at]]
    saved = state.residual_state(ddp.module.named_parameters())
    ddp, state = wrapped(name, options)
    state.load_residual_state(saved, ddp.module.named_parameters())
    again = state.residual_state(ddp.module.named_parameters())
    assert again["steps"] == saved["steps"] == at
    torch.testing.assert_close(again["residuals"], saved["residuals"], rtol=0, atol=0)
    seen += [stepped(ddp, of_rank[rank]) for of_rank in given[at:]]
    return seen, state.residual_state(ddp.module.named_parameters())


@pytest.mark.multiprocess
def test_topk_continues_from_a_checkpoint_bit_for_bit(pool):
    steps = given(6)
    straight = pool.run(one_run, "topk", OWING["topk"], steps)
    for (seen, _, kept), (seen_again, kept_again) in zip(
        straight, pool.run(resumed, "topk", OWING["topk"], steps, 3), strict=True
    ):
        torch.testing.assert_close(seen_again, seen, rtol=0, atol=0)
        torch.testing.assert_close(kept_again, kept, rtol=0, atol=0)


@pytest.mark.multiprocess
def test_powersgd_pays_after_a_resume_what_it_owed_before(pool):
    nothing = [[[torch.zeros(shape) for shape in SHAPES] for _ in range(RANKS)]] * 8
    steps = given(5) + nothing
    ranks = pool.run(resumed, "powersgd", {"powersgd_rank": 2, "powersgd_start": 4}, steps, 5)
    seen = ranks[0][0]
    # DDP arranges its buckets anew in two steps; then, and not four steps later, the approximation goes on.
    assert not any(part.any() for step in seen[5:7] for part in step)
    assert all(any(part.any() for part in step) for step in seen[7:])
    for index in range(len(SHAPES)):
        put_in = torch.stack([mean(of_rank)[index] for of_rank in steps]).sum(0).flatten()
        applied = torch.stack([step[index] for step in seen]).sum(0).flatten()
        zero = torch.zeros_like(applied)
        owed = torch.stack([kept["residuals"].get(f"parts.{index}", zero) for _, kept in ranks]).mean(0)
        torch.testing.assert_close(applied + owed, put_in, rtol=0, atol=1e-5)


ENTRIES = sum(math.prod(shape) for shape in SHAPES)


@pytest.mark.multiprocess
def test_bytes_are_those_of_the_definition(pool):
    steps = given(4)
    plain = 2 * (RANKS - 1) * 4 * ENTRIES // RANKS
    for _, sent, _ in pool.run(one_run, "bf16", {}, steps):
        assert sent == [plain // 2] * 4
    for _, sent, _ in pool.run(one_run, "topk", {"topk_share": 0.1}, steps):
        # 85 + 4 + 41 + 1 + 1 (one at least) + 8 entries, each a value and an index of four bytes
        assert sent == [(RANKS - 1) * 8 * (85 + 4 + 41 + 1 + 1 + 8)] * 4
    for _, sent, _ in pool.run(one_run, "powersgd", {"powersgd_rank": 2, "powersgd_start": 2}, steps):
        # (n + m) · 2 for the two large matrices; where that does not halve the bytes, the entries themselves
        entries = 2 * (37 + 23) + 37 + 2 * (11 + 37) + 11 + 5 + 3 * 28
        assert sent == [plain] * 2 + [2 * (RANKS - 1) * 4 * entries // RANKS] * 2


@pytest.mark.multiprocess
def test_half_precision_gradients_keep_their_residuals_in_fp32(pool):
    steps = given(6, torch.bfloat16)
    ranks = pool.run(one_run, "topk", {"topk_share": 0.05}, steps)
    for index in range(len(SHAPES)):
        put_in = torch.stack([torch.stack([r[index].float() for r in of_rank]).mean(0) for of_rank in steps]).sum(0)
        applied = torch.stack([step[index].float() for step in ranks[0][0]]).sum(0).flatten()
        owed = torch.stack([kept["residuals"][f"parts.{index}"] for _, _, kept in ranks]).mean(0)
        assert ranks[0][0][0][index].dtype == torch.bfloat16 and owed.dtype == torch.float32
        torch.testing.assert_close(applied + owed, put_in.flatten(), rtol=2**-7, atol=2**-7)
    sent = ranks[0][1]
    assert sent == [(RANKS - 1) * 6 * (43 + 2 + 20 + 1 + 1 + 4)] * 6


@pytest.mark.multiprocess
def test_every_rank_sees_an_entry_that_is_not_finite_and_only_once(pool):
    steps = given(3)
    steps[1][1][0][5, 7] = torch.nan
    steps[1][0][2][1, 2] = torch.inf
    for seen, _, kept in pool.run(one_run, "topk", {"topk_share": 0.003}, steps):
        assert seen[1][0][5, 7].isnan() and seen[1][2][1, 2].isinf()
        assert all(part.isfinite().all() for part in seen[2])
        assert all(residual.isfinite().all() for residual in kept["residuals"].values())


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_powersgd_of_a_gradient_of_zeros_is_zero(pool, rank):
    nothing = [[[torch.zeros(shape) for shape in SHAPES] for _ in range(RANKS)]] * 4
    for seen, _, _ in pool.run(one_run, "powersgd", {"powersgd_rank": rank, "powersgd_start": 2}, nothing):
        assert all(not part.any() for step in seen for part in step)  # NaN would be true


def final_loss(rank: int, world: int, name: str, options: dict, forget: bool = False) -> float:
    """A small regression by SGD, half of the samples on each rank; the loss over all of them after 150 steps."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(128, 20, generator=draw)
    y = torch.tanh(x @ torch.randn(20, 16, generator=draw) / 4) @ torch.randn(16, 4, generator=draw)
    torch.manual_seed(1)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 4)), bucket_cap_mb=2 / 1024)
    pair = gradient_hook(name, **options)
    if pair is not None:
        ddp.register_comm_hook(*pair)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        if forget:
            assert isinstance(pair[0], TopK)
            pair[0].residuals.clear()
    weights = torch.cat([p.detach().flatten() for p in ddp.parameters()])
    other = weights.clone()
    dist.broadcast(other, 0)
    assert torch.equal(weights, other), "the ranks have drifted apart"
    return nn.functional.mse_loss(ddp.module(x), y).item()


@pytest.fixture(scope="module")
def plain_loss(pool) -> float:
    return pool.run(final_loss, "none", {})[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("bf16", {}, 1.001),
        ("powersgd", {"powersgd_rank": 1, "powersgd_start": 2}, 1.05),
        ("topk", {"topk_share": 0.01}, 1.15),
    ],
)
def test_training_comes_to_the_loss_of_plain_averaging(pool, plain_loss, name, options, most):
    for loss in pool.run(final_loss, name, options):
        assert loss <= most * plain_loss


@pytest.mark.multiprocess
def test_without_error_feedback_the_same_run_is_clearly_worse(pool, plain_loss):
    for loss in pool.run(final_loss, "topk", {"topk_share": 0.01}, True):
        assert loss >= 5 * plain_loss


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 9), (4, 9), (9, 9), (333, 1000), (999, 1000)])
def test_largest_are_those_of_a_stable_sort(count, size):
    draw = torch.Generator().manual_seed(size)
    for x in (
        torch.randn(size, generator=draw),
        torch.randint(-3, 4, (size,), generator=draw).float(),
        torch.ones(size),
    ):
        order = sorted(range(size), key=lambda i: (-abs(x[i].item()), i))
        assert sorted(largest(x, count).tolist()) == sorted(order[:count])


def test_largest_counts_what_is_not_a_number_first():
    x = torch.tensor([1.0, torch.nan, -torch.inf, 5.0, torch.nan])
    assert sorted(largest(x, 2).tolist()) == [1, 2]
    assert sorted(largest(x, 4).tolist()) == [1, 2, 3, 4]


def test_none_is_no_hook():
    assert gradient_hook("none") is None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fp8", {}, r"strategy.comm_hook is 'fp8'; it must be one of none, bf16, powersgd, topk"),
        ("topk", {"topk_share": 0.0}, r"strategy.topk_share is 0.0; .* above 0 and at most 1"),
        ("topk", {"topk_share": 1.5}, r"strategy.topk_share is 1.5; "),
        ("topk", {"topk_share": math.nan}, r"strategy.topk_share is nan; "),
        ("powersgd", {"powersgd_rank": 0}, r"strategy.powersgd_rank is 0; .* at least 1"),
        ("powersgd", {"powersgd_start": 1}, r"strategy.powersgd_start is 1; .* at least 2"),
    ],
)
def test_errors_name_the_field_its_value_and_the_rule(name, options, words):
    with pytest.raises(ValueError, match=words):
        gradient_hook(name, **options)


def test_a_checkpoint_of_another_model_or_hook_is_refused():
    saved = {"steps": 3, "residuals": {"weight": torch.ones(6)}}
    state = gradient_hook("topk")[0]
    with pytest.raises(ValueError, match="residual of 6 entries for weight, and the model has 8 entries; resume with"):
        state.load_residual_state(saved, nn.Linear(4, 2).named_parameters())
    with pytest.raises(ValueError, match="and the model has no such parameter; resume with"):
        state.load_residual_state(saved, [])
    with pytest.raises(ValueError, match=r"this strategy.comm_hook does not use; resume with .* \(topk or powersgd\)"):
        gradient_hook("bf16")[0].load_residual_state(saved, nn.Linear(3, 2).named_parameters())
