import pytest
import torch

from lightsparse.analysis import tile_map
from lightsparse.analysis.tile_map import dense_map, dilated_pairs, distinct_heads, first_sample, of_core, random_input
from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.attention.dilated import DilatedAttention, DilatedConfig
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow
from lightsparse.patterns.mask import document_starts

N = 111
DILATED = {
    "all": DilatedConfig(segment_lengths=(16, 40, 96), dilation_rates=(1, 2, 3), block=16),
    "partition": DilatedConfig(segment_lengths=(20, 64), dilation_rates=(2, 5), branches="partition", block=16),
    "pattern": DilatedConfig(
        segment_lengths=(32, 111), dilation_rates=(1, 2), block=16, pattern=LocalWindow(20) | GlobalTokens(3)
    ),
}


def context(documents=None):
    positions = torch.arange(N)[None]
    return SequenceContext(positions, documents if documents is None else documents.int()[None])


def read_by_core(core, ctx):
    """Bool [H, N, N]: where the core's weights are not zero; with the identity for values they are its output."""
    q, k = (torch.randn(1, heads, N, N) for heads in (core.shape.heads, core.shape.kv_heads))
    v = torch.eye(N).expand(1, core.shape.kv_heads, N, N).contiguous()
    with torch.no_grad():
        return core(q, k, v, x=torch.empty(1, N, 0), ctx=ctx).out[0] > 0


@pytest.mark.parametrize("config", DILATED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_a_dilated_map_is_the_share_of_pairs_that_the_core_reads(config, causal, packed):
    core = DilatedAttention(DILATED[config], AttentionShape(4, 2, 8, 32, causal=causal))
    documents = torch.arange(N) >= 37 if packed else torch.zeros(N, dtype=torch.bool)
    truth = read_by_core(core, context(documents))
    start, index = document_starts(documents.int()[None])[0].long(), torch.arange(N)
    within = tile_map._layout_of_pattern(core, N, documents.int()[None])
    possible = start[:, None] == start
    if causal:
        possible = possible.tril()
    drawn = of_core(core, N, context(documents))
    assert sorted(head for panel in drawn.panels for head in panel.heads) == [0, 1, 2, 3]
    for panel in drawn.panels:
        for head in panel.heads:
            assert torch.equal(truth[head], dilated_pairs(core, head, index, index, start, within))
        padded = [torch.nn.functional.pad(x.float(), (0, 1, 0, 1)) for x in (truth[panel.heads[0]], possible)]
        read, all_pairs = (x.unflatten(1, (7, 16)).unflatten(0, (7, 16)).sum((1, 3)) for x in padded)
        torch.testing.assert_close(panel.read, read / all_pairs.clamp(min=1))
        assert torch.equal(drawn.dense > 0, all_pairs > 0)


def test_a_long_dilated_context_is_drawn_with_the_same_shares_in_fewer_pixels(monkeypatch):
    core = DilatedAttention(DILATED["all"], AttentionShape(2, 2, 8, 16))
    monkeypatch.setattr(tile_map, "MAX_PIXELS", 4)
    drawn = of_core(core, N, context())
    assert drawn.pixel == (32, 32) and drawn.panels[0].read.shape == (4, 4)
    read, past = read_by_core(core, context())[0, 64:96, 32:64], torch.ones(32, 32)
    assert drawn.panels[0].read[2, 1] == pytest.approx(float(read.sum() / past.sum()))


def test_the_density_of_a_dilated_map_is_the_cores_own():
    core = DilatedAttention(DILATED["all"], AttentionShape(4, 2, 8, 32))
    q, k, v = (torch.randn(1, heads, N, 8) for heads in (4, 2, 2))
    assert of_core(core, N, context()).density == core(q, k, v, x=q, ctx=context()).stats["density"]


def test_dilated_heads_of_one_residue_share_a_panel():
    core = DilatedAttention(DILATED["all"], AttentionShape(16, 8, 8, 128))
    panels = of_core(core, N, context()).panels  # residues mod 2 and mod 3: six classes of key/value heads
    assert [panel.heads for panel in panels] == [[0, 1, 12, 13], [2, 3, 14, 15], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_choosing_core_shows_the_choice_for_the_given_input():
    torch.manual_seed(0)
    core = BlockSparseAdaptive(AdaptiveConfig(block=16, density=0.5, k_max=2), AttentionShape(4, 2, 8, 32)).eval()
    core.router.offset.data.zero_()
    given = random_input(core.shape, N, seed=1)
    drawn = of_core(core, N, context(), given)
    chosen = core.select(*given, context()).layout
    assert drawn.density == chosen.density()
    for panel in drawn.panels:
        for head in panel.heads:
            assert torch.equal(panel.read.bool(), chosen.block_map()[0, head])
    other = of_core(core, N, context(), random_input(core.shape, N, seed=2))
    assert not torch.equal(other.panels[0].read, drawn.panels[0].read)


def test_without_input_a_choosing_core_takes_a_random_one_that_is_always_the_same():
    core = BlockSparseAdaptive(AdaptiveConfig(block=16, density=0.5, k_max=2), AttentionShape(4, 2, 8, 32))
    first, again = of_core(core, N, context()), of_core(core, N, context())
    assert torch.equal(first.panels[0].read, again.panels[0].read)
    q, k, x = random_input(core.shape, N)
    assert (q.shape, k.shape, x.shape) == ((1, 4, N, 8), (1, 2, N, 8), (1, N, 32))
    assert torch.nn.functional.cosine_similarity(q[:, :, 1:], q[:, :, :-1], dim=-1).min() > 0.9


def test_a_core_with_nothing_to_show_says_so():
    with pytest.raises(NotImplementedError, match="AttentionCore has no layout"):
        of_core(AttentionCore(AdaptiveConfig(), AttentionShape(4, 2, 8, 32)), N, context())


def test_the_pale_part_is_what_dense_attention_computes():
    documents = torch.zeros(1, 160, dtype=torch.int32)
    documents[:, 50:] = 1
    layout = LocalWindow(1000).layout(160, block=16, documents=documents)
    assert torch.equal(dense_map(layout), layout.block_map()[0, 0])
    both_ways = LocalWindow(5).layout(100, block=16, causal=False)
    assert dense_map(both_ways).all()


def test_heads_with_one_pattern_share_a_panel():
    layout = BlockDilated((64, 256), (1, 2)).layout(256, block=16, heads=4)
    assert [heads for heads, _ in distinct_heads(layout)] == [[0, 2], [1, 3]]
    assert [heads for heads, _ in distinct_heads(LocalWindow(5).layout(64, block=16, heads=4))] == [[0]]


def test_the_first_sample_is_drawn():
    documents = torch.zeros(2, 64, dtype=torch.int32)
    documents[1, 32:] = 1
    layout = LocalWindow(64).layout(64, block=16, documents=documents)
    alone = LocalWindow(64).layout(64, block=16)
    assert torch.equal(first_sample(layout).block_map(), alone.block_map())
