"""Hierarchical attention against its definition written out query by query, its presets, and what it promises."""

import math
from dataclasses import replace
from itertools import pairwise

import matplotlib.image
import pytest
import torch

from lightsparse.analysis.pattern_picture import image, save
from lightsparse.analysis.tile_map import dense_map, of_layout
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.hierarchical import PRESETS, BlockSparseHierarchical, HierarchicalConfig
from lightsparse.attention.pooling.pooled_keys import with_summaries
from lightsparse.config.parse import compose
from lightsparse.kernels import use_backend
from lightsparse.patterns import Hierarchical, PooledHierarchy
from lightsparse.patterns.hierarchical import Segment
from lightsparse.patterns.mask import ALWAYS

SMALL = HierarchicalConfig().small()
UNEVEN = replace(SMALL, levels=((5, 1), (11, 3), (40, 6), (None, 30)))


def core_of(config, *, heads=4, kv_heads=2, dim=16, context=None):
    return BlockSparseHierarchical(config, AttentionShape(heads, kv_heads, dim, heads * dim, context=context)).eval()


def inputs(n, *, batch=2, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    return [
        torch.randn(batch, h, n, dim, generator=g, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    ]


def attend(core, q, k, v, documents=None):
    q_start = k.shape[2] - q.shape[2]
    ctx = SequenceContext(torch.arange(q_start, k.shape[2])[None], documents, q_start=q_start)
    return core(q, k, v, x=None, ctx=ctx).out


def packed(n, *borders_of_samples):
    ids = torch.zeros(len(borders_of_samples), n, dtype=torch.int32)
    for sample, borders in enumerate(borders_of_samples):
        for border in borders:
            ids[sample, border:] += 1
    return ids


def what_a_query_reads(i, levels, document):
    """Groups (start, stride) of the definition: each past token through the coarsest group it has been handed to."""
    groups = set()
    for j in range(i + 1):
        if document[j] != document[i]:
            continue
        start, stride = j, 1
        for (window, _), (_, coarser) in pairwise(levels):
            first = j // coarser * coarser
            handed_over = i >= first + coarser + window
            if handed_over and (document[first : first + coarser] == document[i]).all():
                start, stride = first, coarser
        groups.add((start, stride))
    return sorted(groups)


def by_definition(q, k, v, config, documents=None):
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    documents = torch.zeros(len(q), n) if documents is None else documents
    samples = []
    for b in range(len(q)):
        rows = []
        for i in range(n):
            groups = what_a_query_reads(i, config.levels, documents[b])
            keys, values = (torch.stack([x[b, :, s : s + c].mean(1) for s, c in groups], 1) for x in (k, v))
            counts = torch.tensor([c if config.log_count else 1 for _, c in groups], dtype=q.dtype)
            scores = keys.repeat_interleave(group, 0) @ q[b, :, i, :, None] / math.sqrt(q.shape[-1])
            weights = (scores[..., 0] + counts.log()).softmax(-1)
            rows.append((weights[..., None] * values.repeat_interleave(group, 0)).sum(1))
        samples.append(torch.stack(rows, 1))
    return torch.stack(samples)


@pytest.mark.parametrize("documents", [None, packed(83, (37, 38, 70), (9,))], ids=["one", "packed"])
@pytest.mark.parametrize("log_count", [True, False])
@pytest.mark.parametrize("config", [SMALL, UNEVEN], ids=["small", "uneven"])
def test_output_and_gradients_are_those_of_the_definition(config, log_count, documents):
    config = replace(config, log_count=log_count)
    given = inputs(83)
    weights = torch.randn(2, 4, 83, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, right = attend(core_of(config), *given, documents), by_definition(*given, config, documents)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
    for grad, expected in zip(
        *(torch.autograd.grad((out * weights).sum(), given) for out in (found, right)), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [63, 111, 333])
def test_with_equal_scores_a_query_averages_its_past_as_dense_attention_does(n):
    q, k, v = inputs(n)
    out = attend(core_of(SMALL), torch.zeros_like(q), k, v)
    mean = v.cumsum(2) / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(out, mean.repeat_interleave(2, 1), rtol=0, atol=1e-10)


def test_every_past_token_reaches_the_last_output_and_its_gradient_reaches_the_token():
    q, k, v = inputs(333)
    out = attend(core_of(SMALL), q, k, v)[:, :, -1]
    grad_k, grad_v = torch.autograd.grad(out.sum(), (k, v))
    assert (grad_v.abs().amin((0, 1, 3)) > 0).all() and (grad_k.abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.parametrize("documents", [None, packed(111, (40,), (7, 64))], ids=["one", "packed"])
def test_queries_behind_a_cache_give_the_rows_of_the_full_pass(documents):
    q, k, v = inputs(111)
    core = core_of(SMALL)
    for stop in (34, 35, 80, 111):
        held = None if documents is None else documents[:, :stop]
        whole = attend(core, q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], held)
        for start in (0, 16, 33, stop - 1):
            rows = attend(core, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], held)
            torch.testing.assert_close(rows, whole[:, :, start:], rtol=0, atol=1e-10)
        full = attend(core, q, k, v, documents)[:, :, :stop]
        torch.testing.assert_close(whole, full, rtol=0, atol=1e-10)


def test_the_slow_backend_agrees_with_and_without_dropout():
    given = [x.detach().float() for x in inputs(111)]
    for rate in (0.0, 0.4):
        core = core_of(replace(SMALL, dropout=rate)).train()
        fast = attend(core, *given)
        with use_backend("reference"):
            torch.testing.assert_close(fast, attend(core, *given), rtol=0, atol=1e-5)


def test_a_summary_is_the_mean_in_fp32_rounded_once():
    x = torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    segments = (Segment(1, -1, 300, 0), Segment(4, 9, 72, 19), Segment(16, 25, 17, 24))
    keys = with_summaries(x, segments, 16)
    assert keys.shape == (1, 2, (19 + 5 + 2) * 16, 8)
    assert torch.equal(keys[:, :, :300], x) and not keys[:, :, 300:304].any()
    for level in segments[1:]:
        means = keys[:, :, level.first_block * 16 :][:, :, : level.count]
        exact = x.double()[:, :, : level.count * level.stride].unflatten(2, (-1, level.stride)).mean(3)
        error, half_a_step = (means.double() - exact).abs(), 2.0**-8 * exact.abs()
        assert (error <= 1.001 * half_a_step + 1e-6).all()


# The densities stated beside the presets, and at 64k under 15% for every one of them.
BOUNDS = {
    "standard": (0.30, 0.10, 0.03),
    "fine_grained": (0.52, 0.19, 0.065),
    "long_range": (0.20, 0.075, 0.03),
    "ultra_sparse": (0.10, 0.035, 0.01),
}


@pytest.mark.parametrize("length", [0, 1, 2], ids=["4k", "16k", "64k"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stays_within_its_density_and_leaves_no_token_out_of_reach(preset, length):
    n, bound = 4096 * 4**length, BOUNDS[preset][length]
    layout = preset_layout(preset, n)
    assert 0.8 * bound <= layout.density() <= bound and (length < 2 or bound < 0.15)
    assert_partition(layout, core_of(HierarchicalConfig(preset=preset)).pattern, n)


def preset_layout(preset, n):
    core = core_of(HierarchicalConfig(preset=preset))
    return core.layout(n, SequenceContext(torch.arange(n)[None]), torch.device("cpu"))


def assert_partition(layout, pattern, n):
    """Every query from token j on reads j or one summary of it: the spans meet, and all their tiles are listed."""
    opens, closes = layout.mask.visible_from[0].long(), layout.mask.visible_until[0].long()
    token = torch.arange(n)
    assert torch.equal(opens[:n], token)
    until = closes[:n]
    for level in pattern.segments(n, layout.kv_block)[1:]:
        group = (token // level.stride).clamp(max=level.count - 1)
        key = level.first_block * layout.kv_block + group
        handed_over = until < ALWAYS
        assert torch.equal(opens[key][handed_over], until[handed_over])
        assert torch.equal(group[handed_over], (token // level.stride)[handed_over])
        until = torch.where(handed_over, closes[key], until)
    assert (until == ALWAYS).all()

    block = layout.kv_block
    first_query = torch.arange(0, n, block)[:, None]
    seen = opens < n
    first = torch.where(seen, opens, ALWAYS).unflatten(0, (-1, block)).amin(1)
    last = torch.where(seen, closes, 0).unflatten(0, (-1, block)).amax(1)
    read = (first <= first_query + block - 1) & (last > first_query)
    assert torch.equal(layout.block_map()[0, 0], read)


def test_density_solves_the_near_window_at_the_training_context():
    for reduce in ("mean", None):
        config = HierarchicalConfig(preset="long_range", reduce=reduce, density=0.25)
        core = core_of(config, context=16384)
        ctx = SequenceContext(torch.arange(16384)[None])
        density = core.layout(16384, ctx, torch.device("cpu")).density()
        assert density == pytest.approx(0.25, rel=0.02)
    with pytest.raises(ValueError, match="the least is"):
        core_of(HierarchicalConfig(density=0.001), context=16384)
    with pytest.raises(ValueError, match="give context, the length it refers to"):
        core_of(HierarchicalConfig(density=0.2))


def test_without_reduction_the_strided_blocks_themselves_are_read():
    config = replace(SMALL, reduce=None)
    given = inputs(111)
    core = core_of(config)
    layout = core.layout(111, SequenceContext(torch.arange(111)[None]), torch.device("cpu"))
    plain = Hierarchical(config.levels).layout(111, block=16)
    assert torch.equal(layout.to_dense(), plain.to_dense()) and layout.num_keys == 111
    q, k, v = given
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=plain.to_dense())
    torch.testing.assert_close(attend(core, *given), right, rtol=0, atol=1e-10)


def test_a_budget_of_everything_has_no_summaries_at_all():
    core = core_of(HierarchicalConfig().full())
    layout = core.layout(1000, SequenceContext(torch.arange(1000)[None]), torch.device("cpu"))
    assert layout.density() == 1.0 and layout.num_keys == 1000


def test_the_picture_shows_summaries_beside_the_tokens(tmp_path):
    layout = PooledHierarchy(9, ((25, 4), (None, 16))).layout(333, block=16)
    drawn, dense, read = of_layout(layout), dense_map(layout), layout.block_map()[0, 0]
    colours = image(drawn, drawn.panels[0])
    assert dense.shape == read.shape and not dense[:, 21:].any()
    assert torch.equal(dense[:, :21], torch.ones(21, 21, dtype=torch.bool).tril())
    assert torch.equal(colours[:, :, 0] < 0.5, read) and read[:, 21:].any()
    path = save(layout, tmp_path / "pattern.png", "hierarchical")
    assert matplotlib.image.imread(path).shape[2] in (3, 4)


def test_levels_and_presets_are_chosen_by_override():
    own = compose(["attention=hierarchical", "attention.preset=null", "attention.levels=[[16,1],[null,8]]"])
    assert own.attention.config == HierarchicalConfig(preset=None, levels=((16, 1), (None, 8)))
    assert compose(["attention=hierarchical"]).attention.config == HierarchicalConfig()
    node = "+attention.pattern.far={_target_:lightsparse.patterns.Hierarchical,levels:[[256,1],[null,8]]}"
    assert compose(["attention=block_sparse", node]).attention.config.pattern["far"] == Hierarchical(
        ((256, 1), (None, 8))
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"preset": None}, "attention.levels is empty"),
        ({"levels": ((8, 1), (None, 4))}, "attention.preset is standard and attention.levels"),
        ({"preset": None, "levels": ((8, 1),)}, "attention.levels is"),
        ({"preset": None, "levels": ((8, 2), (None, 4))}, "stride 1"),
        ({"preset": None, "levels": ((8, 1), (4, 4), (None, 8))}, "must not be smaller"),
        ({"preset": None, "levels": ((8, 1), (16, 4), (None, 6))}, "not 6 after 4"),
        ({"preset": None, "levels": ((0, 1), (None, 4))}, "at least 1"),
        ({"block": 0}, "attention.block is 0"),
    ],
)
def test_levels_that_make_no_hierarchy_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        HierarchicalConfig(**fields)


def test_reading_both_ways_is_refused_with_the_alternative():
    with pytest.raises(ValueError, match=r"causal only; use objective=causal \(causal=True\) or another attention"):
        BlockSparseHierarchical(SMALL, AttentionShape(4, 2, 16, 64, causal=False))
