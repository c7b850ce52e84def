"""Dense attention: PyTorch's own where nothing is left out, the kernels under a pattern where something is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightsparse.attention import AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.config.parse import compose
from lightsparse.kernels import use_backend
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Pattern, Strided
from lightsparse.training.preflight.check import layout_of

DIM, BLOCK = 8, 16
PATTERNS = [
    LocalWindow(20),
    Strided(3),
    LocalWindow(9) | GlobalTokens(3),
    BlockDilated((64,), (2,)) & LocalWindow(50),
]


def core_of(pattern: Pattern | None = None, causal: bool = True, **fields) -> DenseAttention:
    shape = AttentionShape(4, 2, DIM, 4 * DIM, causal=causal)
    return DenseAttention(DenseConfig(pattern=pattern, block=BLOCK, **fields), shape).eval()


def random_qkv(n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, h, n, DIM, generator=g, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    return q, k, v


def attend(core: DenseAttention, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> AttentionResult:
    start, n = k.shape[2] - q.shape[2], k.shape[2]
    ctx = SequenceContext(torch.arange(start, n)[None], documents, q_start=start)
    return core(q, k, v, x=torch.empty(0), ctx=ctx)


def tiles_of(pattern: Pattern, n: int, causal: bool, documents: Tensor | None) -> Tensor:
    """Bool [B|1, 4, blocks, blocks]: tiles that the pattern reads."""
    layout = pattern.layout(n, block=BLOCK, heads=4, kv_heads=2, causal=causal, documents=documents)
    tiles = layout.block_map()
    return tiles.repeat_interleave(4 // tiles.shape[1], 1)


def pairs(n: int, causal: bool, documents: Tensor | None) -> Tensor:
    """Bool [B|1, 1, N, N]: what dense attention reads."""
    ids = torch.zeros(1, n) if documents is None else documents
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    return same.tril() if causal else same


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(~allowed, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


def packed(n: int) -> Tensor:
    """Two samples; most documents start on no block."""
    return torch.stack([(torch.arange(n) >= 5).int() + (torch.arange(n) >= 50).int(), (torch.arange(n) >= 64).int()])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("documents", [None, packed(111)], ids=["one-document", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_with_a_pattern_it_is_dense_attention_under_the_combined_mask(pattern, documents, causal):
    qkv = random_qkv(111, 2)
    tiles = tiles_of(pattern, 111, causal, documents).repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    expected = written_out(*qkv, tiles[:, :, :111, :111] & pairs(111, causal, documents))
    found = attend(core_of(pattern, causal), *qkv, documents).out
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = (torch.autograd.grad((out * weight).sum(), qkv) for out in (found, expected))
    for name, grad, right in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(grad, right, atol=1e-12, rtol=0, msg=lambda m, n=name: f"grad {n}: {m}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("pattern", [None, *PATTERNS], ids=lambda p: type(p).__name__)
def test_density_is_the_share_of_dense_tiles_that_are_computed(pattern, causal):
    blocks = 7
    computed = tiles_of(pattern or LocalWindow(1000), blocks * BLOCK, causal, None)
    every = tiles_of(LocalWindow(1000), blocks * BLOCK, causal, None)
    density = attend(core_of(pattern, causal), *random_qkv(blocks * BLOCK)).stats["density"]
    assert float(density) == pytest.approx(float(computed.sum() / every.sum()))
    assert (float(density) < 1) == (pattern is not None)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("documents", [None, packed(75)], ids=["one-document", "packed"])
def test_without_a_pattern_every_pair_of_a_document_is_read(documents, causal):
    qkv = random_qkv(75, 2)
    expected = written_out(*qkv, pairs(75, causal, documents))
    result = attend(core_of(causal=causal), *qkv, documents)
    torch.testing.assert_close(result.out, expected, atol=1e-12, rtol=0)
    assert float(result.stats["density"]) == 1.0


def test_without_a_pattern_documents_go_to_the_fused_kernel_one_by_one(monkeypatch):
    lengths = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        lengths.append(k.shape[2])
        return fused(q, k, v, **options)

    monkeypatch.setattr("lightsparse.attention.dense.scaled_dot_product_attention", watched)
    attend(core_of(), *random_qkv(75, 2), packed(75))
    assert lengths == [5, 45, 25, 64, 11]
    attend(core_of(LocalWindow(20)), *random_qkv(75, 2), packed(75))
    assert len(lengths) == 5


@pytest.mark.parametrize("pattern", [None, *PATTERNS], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("documents", [None, packed(75)], ids=["one-document", "packed"])
def test_fewer_queries_than_keys_give_the_last_rows(pattern, documents):
    core, (q, k, v) = core_of(pattern), random_qkv(75, 2)
    whole = attend(core, q, k, v, documents).out
    for start in (1, 31, 32, 70, 74):
        part = attend(core, q[:, :, start:], k, v, documents).out
        torch.testing.assert_close(part, whole[:, :, start:], atol=1e-12, rtol=0)


def test_dropout_under_a_pattern_acts_in_training_only_and_agrees_with_the_reference():
    core, qkv = core_of(LocalWindow(20), dropout=0.4), random_qkv(63)
    kept, dropped = attend(core, *qkv).out, attend(core.train(), *qkv).out
    assert not torch.allclose(kept, dropped)
    assert torch.equal(dropped, attend(core, *qkv).out)
    with use_backend("reference"):
        torch.testing.assert_close(attend(core, *qkv).out, dropped, atol=1e-12, rtol=0)
    torch.testing.assert_close(attend(core.eval(), *qkv).out, kept)


def test_the_block_is_the_grid_of_the_pattern():
    config = DenseConfig(pattern=LocalWindow(20), block=BLOCK)
    shape, qkv = AttentionShape(4, 2, DIM, 4 * DIM), random_qkv(75)
    coarse, fine = (attend(DenseAttention(c, shape), *qkv) for c in (config, replace(config, block=4)))
    assert not torch.allclose(coarse.out, fine.out)
    assert float(fine.stats["density"]) < float(coarse.stats["density"])


def test_full_drops_the_pattern():
    config = DenseConfig(pattern=LocalWindow(20), block=BLOCK)
    assert config.full().pattern is None and config.small().pattern == LocalWindow(20)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"density": 0.5}, "attention.density is 0.5; .* use attention=block_sparse"),
        ({"density": 1.0, "pattern": LocalWindow(20)}, "attention.density is 1.0; .* no parameter to solve"),
        ({"block": 0}, "attention.block is 0"),
    ],
)
def test_an_impossible_config_is_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        DenseConfig(**fields)
    assert "\n" not in str(error.value)


def test_a_pattern_that_cannot_serve_the_shape_is_refused_at_construction():
    config = DenseConfig(pattern=BlockDilated((100,), (2,)))
    with pytest.raises(ValueError, match="every entry must be a multiple of the block, 64 tokens"):
        DenseAttention(config, AttentionShape(2, 2, DIM, 2 * DIM, context=1000))


def test_the_yaml_takes_a_pattern():
    config = compose(["attention=dense", "data.context=1024"])
    assert layout_of(config).density() == 1.0
    window = "{_target_: lightsparse.patterns.LocalWindow, window: 128}"
    config = compose(["attention=dense", "data.context=1024", f"attention.pattern={window}"])
    assert isinstance(config.attention.config, DenseConfig) and config.attention.config.pattern == LocalWindow(128)
    assert layout_of(config).density() == LocalWindow(128).layout(1024, block=64).density() < 0.5
