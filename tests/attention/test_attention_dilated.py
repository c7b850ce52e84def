"""LongNet's dilated attention against one softmax over the multiset of what all branches read, written out."""

import copy
import io
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightsparse.attention import AttentionShape, SequenceContext
from lightsparse.attention.dilated import DilatedAttention, DilatedConfig
from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.kernels import use_backend
from lightsparse.models import ModelConfig, Transformer, context_for
from lightsparse.patterns import AtDensity, BlockDilated, GlobalTokens, LocalWindow, Strided
from lightsparse.patterns.mask import document_starts

DIM = 8


def core_of(config: DilatedConfig, heads: int = 4, kv_heads: int = 2, causal: bool = True) -> DilatedAttention:
    return DilatedAttention(config, AttentionShape(heads, kv_heads, DIM, heads * DIM, causal=causal)).eval()


def random_qkv(n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(n)

    def leaf(of_heads: int) -> Tensor:
        return torch.randn(batch, of_heads, n, DIM, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return leaf(heads), leaf(kv_heads), leaf(kv_heads)


def attend(core: DilatedAttention, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, seed: int = 1):
    start, n = k.shape[2] - q.shape[2], k.shape[2]
    ctx = SequenceContext(torch.arange(start, n)[None], documents, q_start=start, seed=seed)
    return core(q, k, v, x=torch.empty(0), ctx=ctx)


def documents_at(n: int, *borders_of_samples: tuple[int, ...]) -> Tensor:
    """Document ids of samples of n tokens; borders beyond n are left out."""
    starts = torch.zeros(len(borders_of_samples), n, dtype=torch.int32)
    for sample, borders in enumerate(borders_of_samples):
        starts[sample, [border for border in borders if border < n]] = 1
    return starts.cumsum(1).to(torch.int32)


def times_read(core: DilatedAttention, n: int, documents: Tensor | None = None) -> Tensor:
    """In how many branches query i reads key j: int64 [B|1, H, N, N], from the paper's definition."""
    config, shape = core.config, core.shape
    kv_heads, group = shape.kv_heads, shape.heads // shape.kv_heads
    document = torch.zeros(1, n, dtype=torch.int32) if documents is None else documents
    position = torch.arange(n) - document_starts(document)
    count = torch.zeros(len(document), kv_heads, n, n, dtype=torch.int64)
    pairs = list(zip(config.segment_lengths, config.dilation_rates, strict=True))
    for branch, (w, r) in enumerate(pairs):
        for head in range(kv_heads):
            if config.branches == "partition" and head not in range(
                kv_heads * branch // len(pairs), kv_heads * (branch + 1) // len(pairs)
            ):
                continue
            kept = position % w % r == head % r
            segment = position // w
            count[:, head] += (
                (document[:, :, None] == document[:, None, :])
                & (segment[:, :, None] == segment[:, None, :])
                & kept[:, :, None]
                & kept[:, None, :]
            )
    if shape.causal:
        count = count.tril()
    count = count.repeat_interleave(group, 1)
    if config.pattern is not None:
        layout = config.pattern.layout(
            n, block=config.block, heads=shape.heads, kv_heads=kv_heads, causal=shape.causal, documents=documents
        )
        allowed = layout.to_dense()
        count = count * allowed.repeat_interleave(shape.heads // allowed.shape[1], 1)
    return count


def joint_softmax(core: DilatedAttention, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Σ_j m_ij exp(s_ij) v_j ÷ Σ_j m_ij exp(s_ij), m = times_read; 0 where nothing is read."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(DIM)
    weights = times_read(core, q.shape[2], documents) * (scores - scores.detach().amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v.repeat_interleave(group, 1) / torch.where(total > 0, total, 1.0)


def check_equal(core: DilatedAttention, qkv, documents: Tensor | None = None, tolerance: float = 1e-12) -> None:
    found, expected = attend(core, *qkv, documents).out, joint_softmax(core, *qkv, documents)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    grads = (torch.autograd.grad((out * weight).sum(), qkv) for out in (found, expected))
    for name, grad, right in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(grad, right, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"grad {n}: {m}")


SMALL = DilatedConfig(segment_lengths=(8, 21, 64), dilation_rates=(1, 2, 5), block=16)
DOCUMENTS = ((5, 30, 31), (64,))  # of two samples; most borders on no multiple of anything

# ---- exactness


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads"), [(1, 2, 2), (17, 4, 1), (63, 2, 2), (101, 6, 3), (111, 8, 8)], ids=str
)
def test_branches_mixed_by_lse_equal_one_softmax_over_their_multiset(n, heads, kv_heads, packed, causal):
    documents = documents_at(n, *DOCUMENTS) if packed else None
    core = core_of(SMALL, heads, kv_heads, causal)
    check_equal(core, random_qkv(n, 2, heads, kv_heads), documents)


def test_fp32_is_within_1e_6_of_the_joint_softmax():
    check_equal(core_of(SMALL), random_qkv(63, 2, dtype=torch.float32), tolerance=1e-6)


@pytest.mark.parametrize(
    ("lengths", "rates"),
    [((12,), (3,)), ((16, 16), (2, 2)), ((40, 10), (7, 1)), ((1 << 20, 3), (2, 3)), ((5, 6, 7), (5, 1, 4))],
    ids=str,
)
def test_any_segment_lengths_and_rates_are_exact(lengths, rates):
    config = DilatedConfig(segment_lengths=lengths, dilation_rates=rates, block=4)
    for causal in (True, False):
        check_equal(core_of(config, 6, 3, causal), random_qkv(75, 1, 6, 3))


@pytest.mark.parametrize(
    "pattern",
    [
        LocalWindow(20),
        Strided(3),
        LocalWindow(9) | GlobalTokens(3),
        AtDensity(LocalWindow(1) | GlobalTokens(2), 0.6, at=111),
    ],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize(("block", "n"), [(1, 39), (5, 111), (16, 111)])
def test_a_pattern_is_intersected_exactly_on_original_positions(pattern, block, n):
    """Rates do not divide the blocks, segments and documents begin inside them, and both ways there are dense rows."""
    config = replace(SMALL, pattern=pattern, block=block)
    for causal in (True, False):
        core = core_of(config, 6, 3, causal)
        qkv = random_qkv(n, 2, 6, 3)
        check_equal(core, qkv)
        check_equal(core, qkv, documents_at(n, *DOCUMENTS))


def test_a_pattern_that_differs_by_head_reaches_its_heads():
    config = replace(SMALL, pattern=BlockDilated((32,), (2,)), block=8)
    check_equal(core_of(config, 6, 3), random_qkv(77, 1, 6, 3))
    check_equal(core_of(replace(config, branches="partition"), 6, 3), random_qkv(77, 1, 6, 3))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_partition_gives_each_group_of_heads_one_segment_length(causal):
    config = replace(SMALL, branches="partition")
    for kv_heads in (3, 5):
        core, qkv = core_of(config, 2 * kv_heads, kv_heads, causal), random_qkv(90, 2, 2 * kv_heads, kv_heads)
        check_equal(core, qkv)
        check_equal(core, qkv, documents_at(90, *DOCUMENTS))
    assert [branch.kv_heads for branch in core.branches] == [(0,), (1, 2), (3, 4)]


def test_the_reference_backend_gives_the_same():
    core, qkv = core_of(SMALL), random_qkv(63)
    with use_backend("reference"):
        slow = attend(core, *qkv).out
    torch.testing.assert_close(attend(core, *qkv).out, slow, atol=1e-12, rtol=0)


# ---- what a head keeps


def test_head_h_keeps_the_positions_that_are_h_mod_r_in_their_segment():
    core = core_of(DilatedConfig(segment_lengths=(10,), dilation_rates=(4,)), heads=6, kv_heads=6)
    q, k, v = random_qkv(25, 1, 6, 6)
    covered = attend(core, q, k, v).out.abs().sum(-1)[0] > 0
    for head in range(6):
        assert covered[head].tolist() == [i % 10 % 4 == head % 4 for i in range(25)]


def test_a_grouped_head_keeps_what_its_key_value_head_keeps():
    core = core_of(DilatedConfig(segment_lengths=(10,), dilation_rates=(2,)), heads=4, kv_heads=2)
    covered = attend(core, *random_qkv(20)).out.abs().sum(-1)[0] > 0
    assert covered[0].equal(covered[1]) and covered[2].equal(covered[3]) and not covered[0].equal(covered[2])


def test_a_position_that_no_branch_keeps_is_zero_and_has_no_gradient():
    core = core_of(DilatedConfig(segment_lengths=(12, 24), dilation_rates=(3, 6)), heads=1, kv_heads=1)
    q, k, v = random_qkv(31, 1, 1, 1)
    out = attend(core, q, k, v).out
    grad_q, grad_k, grad_v = torch.autograd.grad(out.square().sum(), (q, k, v))
    nowhere = torch.tensor([i % 12 % 3 != 0 for i in range(31)])
    assert not out[:, :, nowhere].any()
    for grad in (grad_q, grad_k, grad_v):
        assert not grad[:, :, nowhere].any() and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize(
    "change",
    [
        {"segment_lengths": (8, 21, 63)},
        {"segment_lengths": (9, 21, 64)},
        {"dilation_rates": (1, 2, 4)},
        {"dilation_rates": (1, 1, 5)},
        {"branches": "partition"},
        {"pattern": LocalWindow(5)},
    ],
    ids=str,
)
def test_every_field_changes_the_output(change):
    qkv = random_qkv(111, 1, 6, 3)
    before, after = (attend(core_of(config, 6, 3), *qkv).out for config in (SMALL, replace(SMALL, **change)))
    assert (before - after).abs().max() > 1e-3


def test_the_block_changes_the_density_and_never_the_result():
    qkv = random_qkv(111)
    results = [attend(core_of(replace(SMALL, block=block)), *qkv) for block in (1, 8, 64)]
    for other in results[1:]:
        torch.testing.assert_close(other.out, results[0].out, atol=1e-12, rtol=0)
    densities = [float(result.stats["density"]) for result in results]
    assert densities == sorted(set(densities))


def test_one_segment_over_everything_at_rate_one_is_dense_attention():
    q, k, v = random_qkv(77, 2)
    result = attend(core_of(SMALL.full()), q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(result.out, dense, atol=1e-12, rtol=0)
    assert float(result.stats["density"]) == 1.0


# ---- density


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_density_counts_repeats_above_the_line_and_dense_pairs_below(causal, packed):
    """In blocks of one token, a tile is a pair."""
    n, config = 60, replace(SMALL, block=1)
    documents = documents_at(n, (5, 30), (41,)) if packed else None
    core = core_of(config, causal=causal)
    dense = core_of(replace(config, segment_lengths=(n,), dilation_rates=(1,)), causal=causal)
    read, all_pairs = (times_read(of, n, documents).sum((1, 2, 3)) for of in (core, dense))
    found = attend(core, *random_qkv(n, 2), documents).stats["density"]
    # Where the samples keep different numbers of tokens, spare slots are computed as well.
    assert float(found) == pytest.approx(float((read / all_pairs).mean()), rel=0.05 if packed else 1e-6)


def test_density_of_a_pattern_is_that_of_the_intersection():
    n, config = 60, replace(SMALL, block=1, pattern=LocalWindow(7))
    core = core_of(config)
    share = times_read(core, n).sum() / (core.shape.heads * n * (n + 1) / 2)
    assert float(attend(core, *random_qkv(n)).stats["density"]) == pytest.approx(float(share))


# ---- documents and decoding


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_packed_documents_equal_separate_ones_wherever_they_start(causal):
    core, (q, k, v) = core_of(SMALL, causal=causal), random_qkv(111, 2)
    packed = attend(core, q, k, v, documents_at(111, *DOCUMENTS)).out
    for sample, borders in enumerate(DOCUMENTS):
        edges = (0, *borders, 111)
        for start, stop in pairwise(edges):
            alone = attend(core, *(t[sample : sample + 1, :, start:stop] for t in (q, k, v))).out
            torch.testing.assert_close(packed[sample, :, start:stop], alone[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("pattern", [None, LocalWindow(12) | GlobalTokens(2)], ids=["", "pattern"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_fewer_queries_than_keys_give_the_last_rows(causal, packed, pattern):
    documents = documents_at(90, *DOCUMENTS) if packed else None
    core, (q, k, v) = core_of(replace(SMALL, pattern=pattern), 6, 3, causal), random_qkv(90, 2, 6, 3)
    whole = attend(core, q, k, v, documents).out
    for start in (1, 16, 40, 63, 64, 65, 89):
        torch.testing.assert_close(
            attend(core, q[:, :, start:], k, v, documents).out, whole[:, :, start:], atol=1e-12, rtol=0
        )


def test_decoding_gathers_only_the_segments_of_its_queries():
    core = core_of(DilatedConfig(segment_lengths=(32, 64), dilation_rates=(1, 2)))
    ctx = SequenceContext(torch.tensor([[970]]), q_start=970)
    plan = core._plan(971, ctx, torch.device("cpu"))
    assert [gather.layout.num_keys for of_branch in plan.gathers for gather in of_branch] == [971 - 960, 6]


def test_a_query_that_no_branch_keeps_decodes_to_zero():
    core = core_of(DilatedConfig(segment_lengths=(12, 24), dilation_rates=(3, 6)), heads=1, kv_heads=1)
    q, k, v = random_qkv(30, 1, 1, 1)
    assert not attend(core, q[:, :, 29:], k, v).out.any()


# ---- dropout


@pytest.mark.parametrize("pattern", [None, LocalWindow(30)], ids=["", "pattern"])
def test_dropout_is_a_function_of_the_seed_the_same_on_every_backend(pattern):
    core, qkv = core_of(replace(SMALL, dropout=0.4, pattern=pattern)).train(), random_qkv(63, 2)
    dropped = attend(core, *qkv).out
    assert torch.equal(dropped, attend(core, *qkv).out)
    assert not torch.allclose(dropped, attend(core, *qkv, seed=2).out)
    with use_backend("reference"):
        torch.testing.assert_close(attend(core, *qkv).out, dropped, atol=1e-12, rtol=0)
    torch.testing.assert_close(attend(core.eval(), *qkv).out, joint_softmax(core, *qkv), atol=1e-12, rtol=0)


def test_dropout_leaves_the_mean_and_drops_each_repeat_of_a_pair_by_itself():
    """Two equal branches: with one draw for both, a weight would be 0 or whole; apart, half of it can stay."""
    config = DilatedConfig(segment_lengths=(8, 8), dilation_rates=(1, 1), dropout=0.5)
    core = core_of(config, 1, 1).train()
    q = torch.zeros(400, 1, 8, DIM, dtype=torch.float64)
    v = torch.eye(8, dtype=torch.float64).expand(400, 1, 8, DIM)
    weights = attend(core, q, q, v).out[:, 0]  # [sample, query, key]: every sample draws for itself
    last = weights[:, 7] * 8  # of 8 equal weights; 0, 1 or 2 of a weight's two halves stay, each doubled
    assert set(last.round(decimals=6).unique().tolist()) == {0.0, 1.0, 2.0}
    torch.testing.assert_close(last.mean(0), torch.ones(8, dtype=torch.float64), atol=0.15, rtol=0)


# ---- inside a model


def model_of(checkpoint: bool = False, **fields) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(depth=2, embed_dim=32, heads=4, kv_heads=2, mlp_dim=48, activation_checkpointing=checkpoint)
    return Transformer(
        config, lambda shape: DilatedAttention(replace(SMALL, **fields), shape), vocab_size=31, context=80
    )


def loss_and_gradients(model: Transformer, documents: Tensor | None = None) -> list[Tensor]:
    tokens = torch.randint(0, 31, (2, 80), generator=torch.Generator().manual_seed(4))
    loss = model.loss_sum(model(tokens, context_for(tokens, documents, seed=3)).hidden, tokens.roll(-1, 1))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("documents", [None, documents_at(80, *DOCUMENTS)], ids=["one-document", "packed"])
def test_a_longnet_model_survives_repetition_copies_pickling_and_checkpointing(documents):
    model = model_of(dropout=0.2)
    first = loss_and_gradients(model, documents)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    others = {
        "a second pass": model,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
        "checkpointing": model_of(checkpoint=True, dropout=0.2),
    }
    for name, other in others.items():
        for found, expected in zip(loss_and_gradients(other, documents), first, strict=True):
            if name == "checkpointing":  # by pieces: the same sums in another order
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
            else:
                assert torch.equal(found, expected), name
    assert not any("branches" in key for key in model.state_dict())


def test_training_follows_an_evaluation_in_inference_mode():
    model, tokens = model_of(), torch.zeros(1, 53, dtype=torch.int64)  # a length that nothing else uses
    with torch.inference_mode():
        model(tokens, context_for(tokens))
    model.loss_sum(model(tokens, context_for(tokens)).hidden, tokens).backward()


# ---- config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"segment_lengths": ()}, "same number of entries"),
        ({"segment_lengths": (8, 16)}, r"segment_lengths is \[8, 16\] .* same number"),
        ({"dilation_rates": (1, 2, 0)}, "between 1 and its segment length"),
        ({"dilation_rates": (9, 2, 5)}, "dilation_rates has 9 for a segment length of 8"),
        ({"branches": "some"}, "attention.branches is 'some'; it must be all or partition"),
        ({"block": 0}, "attention.block is 0"),
        ({"density": 0.5}, "attention.density is 0.5; .* use attention=block_sparse"),
        ({"dropout": 1.0}, "attention.dropout is 1.0"),
    ],
)
def test_an_impossible_config_is_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        replace(SMALL, **fields)
    assert "\n" not in str(error.value)


def test_partition_with_too_few_heads_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"partition with 3 segment lengths for 2 .* model.kv_heads=3"):
        core_of(replace(SMALL, branches="partition"))


def test_a_pattern_that_cannot_serve_the_shape_is_refused_at_construction():
    config = replace(SMALL, pattern=GlobalTokens(1, trailing=2))
    DilatedAttention(config, AttentionShape(2, 2, DIM, 2 * DIM, causal=False, context=100))
    with pytest.raises(ValueError, match=r"GlobalTokens\.trailing is 2"):
        DilatedAttention(config, AttentionShape(2, 2, DIM, 2 * DIM, context=100))


def test_the_yaml_scales_the_papers_ratios_to_its_context_and_takes_a_pattern():
    config = compose(["attention=dilated"]).attention.config
    assert isinstance(config, DilatedConfig)
    assert [8 * w for w in config.segment_lengths] == [2048, 4096, 8192, 16384, 32768]
    assert config.dilation_rates == (1, 2, 4, 6, 12)
    window = "{_target_: lightsparse.patterns.LocalWindow, window: 640}"
    config = compose(["attention=dilated", f"attention.pattern={window}"]).attention.config
    assert isinstance(config, DilatedConfig) and config.pattern == LocalWindow(640)
    with pytest.raises(ConfigError, match=r"attention\.branches is 'half'; it must be one of all, partition"):
        compose(["attention=dilated", "attention.branches=half"])
