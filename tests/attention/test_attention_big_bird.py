from dataclasses import dataclass, replace

import pytest
import torch
from transformers import BigBirdConfig as HuggingFaceConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from lightsparse.attention import AttentionShape, SequenceContext
from lightsparse.attention.big_bird import BigBirdAttention, BigBirdConfig
from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.kernels import use_backend
from lightsparse.patterns import BlockGrid, Pattern

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=32, embed_dim=128)


def context(n, documents=None):
    return SequenceContext(positions=torch.arange(n)[None], documents=documents)


def layout(config, shape=SHAPE, n=1000, documents=None):
    return BigBirdAttention(config, shape).layout(n, context(n, documents), torch.device("cpu"))


@dataclass(frozen=True)
class GivenBlocks(Pattern):
    """Another model's random table: key blocks of each row of each head."""

    table: tuple[tuple[tuple[int, ...], ...], ...]  # [head][row]

    def rows(self, grid: BlockGrid) -> torch.Tensor:
        return grid.visible(torch.tensor(self.table, dtype=torch.int32)[None, :, grid.rows.start : grid.rows.stop])


class PublishedBigBird:
    """Hugging Face's block-sparse attention on projected q, k, v, without padding, and the table it drew.

    It is bidirectional with one global block at either end, whose rows are dense, and a window of three blocks. Where
    its code departs from the written definition, and why that does not show here:
    - in eval mode it zeroes its random table, so that block 0 counts 1 + r times in the softmax: hence train();
    - a block that it lists twice counts twice, ours never. For 1024, 3072 and 4096 tokens it draws by an older plan, in
      which a row may draw a block of its own window or the last, global one; for other lengths it draws outside of the
      window and the global blocks, among the first 2r + 5 blocks;
    - its second and second-last rows have a global block in their window, list it once and read r random blocks like
      any other row, which is what the definition gives.
    """

    def __init__(self, block, blocks, random, heads, dim, seed=3):
        config = HuggingFaceConfig(
            hidden_size=heads * dim, num_attention_heads=heads, num_random_blocks=random, block_size=block
        )
        self.module = BigBirdBlockSparseAttention(config, seed=seed).train()
        self.block, self.blocks = block, blocks
        draw = self.module._bigbird_block_rand_mask_with_head

        def recorded(**sizes):
            self.drawn = draw(**sizes)
            return self.drawn

        self.module._bigbird_block_rand_mask_with_head = recorded

    def __call__(self, q, k, v):
        """q, k, v [B, H, N, D] → [B, H, N, D]."""
        batch, heads, n, dim = q.shape
        block, blocks = self.block, self.blocks
        of_blocks = torch.ones(batch, blocks, block)
        out, _ = self.module.bigbird_block_sparse_attention(
            q,
            k,
            v,
            band_mask=torch.ones(batch, 1, blocks - 4, block, 3 * block),
            from_mask=torch.ones(batch, 1, n, 1),
            to_mask=torch.ones(batch, 1, 1, n),
            from_blocked_mask=of_blocks,
            to_blocked_mask=of_blocks,
            n_heads=heads,
            n_rand_blocks=self.module.num_random_blocks,
            attention_head_size=dim,
            from_block_size=block,
            to_block_size=block,
            batch_size=batch,
            from_seq_len=n,
            to_seq_len=n,
            seed=self.module.seed,
            plan_from_length=None,
            plan_num_rand_blocks=None,
        )
        return out.transpose(1, 2)

    def given_blocks(self):
        """The table it drew; it has no entries for the first and the last row, which are dense."""
        nothing = (-1,) * self.module.num_random_blocks
        return GivenBlocks(tuple((nothing, *map(tuple, head.tolist()), nothing) for head in self.drawn))


@pytest.mark.parametrize(("block", "blocks", "random"), [(16, 12, 3), (8, 17, 2), (16, 13, 1)])
def test_it_equals_the_published_block_sparse_attention_on_its_random_table(block, blocks, random):
    heads, dim, n = 4, 32, block * blocks
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(2, heads, n, dim) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(True)

    published = PublishedBigBird(block, blocks, random, heads, dim)
    theirs = published(q, k, v)
    core = BigBirdAttention(
        BigBirdConfig(block=block, window=block, global_tokens=block, random=0),
        AttentionShape(heads, heads, dim, heads * dim, causal=False),
    )
    core.pattern = core.pattern | published.given_blocks()
    ours = core(q, k, v, x=q, ctx=context(n)).out

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_it_equals_the_reference_with_other_draws_in_every_head(packed, causal):
    torch.manual_seed(0)
    config = replace(BigBirdConfig().small(), per_head=True)
    core = BigBirdAttention(config, replace(SHAPE, causal=causal))
    documents = (torch.arange(111) >= torch.tensor([[37], [64]])).int() if packed else None
    q, weight = (torch.randn(2, 4, 111, 32) for _ in range(2))
    k, v = (torch.randn(2, 2, 111, 32) for _ in range(2))

    def outcome():
        leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
        out = core(*leaves, x=q, ctx=context(111, documents)).out
        return out, *torch.autograd.grad((out * weight).sum(), leaves)

    found = outcome()
    with use_backend("reference"):
        expected = outcome()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_layers_share_one_layout_and_a_pass_over_documents_builds_its_own_once():
    config = BigBirdConfig().small()
    cores = [BigBirdAttention(config, replace(SHAPE, layer=layer)) for layer in (0, 1)]
    device = torch.device("cpu")
    first, second = (core.layout(111, context(111), device) for core in cores)
    assert first is second
    ctx = context(111, (torch.arange(111) // 50).int()[None])
    first, second = (core.layout(111, ctx, device) for core in cores)
    assert first is second and first is not cores[0].layout(111, context(111, ctx.documents), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("solve", ["window", "global_tokens", "random"])
def test_density_solves_the_named_field(solve, causal):
    shape = replace(SHAPE, context=2000, causal=causal)
    given = BigBirdConfig(block=16, window=16, global_tokens=16, random=1, density=0.4, solve=solve)
    assert layout(given, shape, 2000).density() == pytest.approx(0.4, rel=0.02)


def test_a_density_of_one_is_everything():
    assert layout(BigBirdConfig(density=1.0)).density() == 1.0
    assert layout(BigBirdConfig().full()).density() == 1.0


def test_a_density_below_the_least_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"density 0\.01 is out of reach"):
        BigBirdAttention(BigBirdConfig(density=0.01), replace(SHAPE, context=2000))


def test_seed_and_per_head_change_the_draw():
    tables = [
        layout(BigBirdConfig(block=16, window=1, random=2, **fields)).kv_indices
        for fields in ({}, {"seed": 1}, {"per_head": True})
    ]
    assert [t.shape[1] for t in tables] == [1, 1, 2]
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[2][:, 0], tables[2][:, 1])


@pytest.mark.parametrize("wrong", [{"block": 0}, {"window": 0}, {"global_tokens": -1}, {"random": -1}])
def test_impossible_sizes_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"attention\.{name} is -?\d; it counts (tokens|blocks) and must be at least"):
        BigBirdConfig(**wrong)


def test_the_yaml_holds_the_configs_fields_and_defaults():
    assert compose(["attention=big_bird"]).attention.config == BigBirdConfig()


def test_only_sizes_can_be_solved_for():
    with pytest.raises(
        ConfigError, match=r"attention\.solve is 'seed'; it must be one of window, global_tokens, random"
    ):
        compose(["attention=big_bird", "attention.solve=seed"])
