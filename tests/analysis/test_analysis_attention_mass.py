import pytest
import torch
from torch import Tensor

from lightsparse.analysis.attention_mass import against_dense
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockDilated, BlockLayout, GlobalTokens, LocalWindow, PooledHierarchy

N, HEADS, KV_HEADS = 71, 4, 2
PATTERNS = {"window": LocalWindow(9), "globals": GlobalTokens(3), "dilated": BlockDilated((32, 64), (2, 4))}
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 41, [0] * 5 + [1] * 60 + [2] * 6], dtype=torch.int32)


def case(name: str, causal: bool, documents: bool) -> tuple[BlockLayout, BlockLayout, Tensor, Tensor, Tensor]:
    """A layout, dense attention over the same documents, q, k, v."""

    def layout(pattern):
        return pattern.layout(
            N, block=8, heads=HEADS, kv_heads=KV_HEADS, causal=causal, documents=DOCUMENTS if documents else None
        )

    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, N, 16, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    return layout(PATTERNS[name]), layout(LocalWindow(N)), 2 * q, k, v


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_mass_and_error_are_those_of_the_two_dense_matrices(name, causal, documents):
    layout, dense, q, k, v = case(name, causal, documents)
    found = against_dense(q, k, layout, v, queries=N)

    scores = q @ k.repeat_interleave(2, 1).mT / 4
    weights = scores.masked_fill(~dense.to_dense().expand(-1, HEADS, -1, -1), float("-inf")).softmax(-1)
    read = layout.to_dense()
    mass = (weights * read.repeat_interleave(HEADS // read.shape[1], 1)).sum(-1)
    assert torch.allclose(found.mass, mass, atol=1e-5)

    expected = block_sparse_attention(q, k, v, dense, backend="reference")
    off = block_sparse_attention(q, k, v, layout, backend="reference") - expected
    assert torch.allclose(found.error, off.norm(dim=-1) / expected.norm(dim=-1), atol=1e-4)
    assert float(found.error.mean()) > 0.01 and float(found.mass.mean()) < 0.99


def test_samples_are_rows_of_the_whole_and_chunks_change_nothing(monkeypatch):
    layout, _, q, k, v = case("dilated", True, True)
    whole, some = against_dense(q, k, layout, v, queries=N), torch.tensor([3, 40, 70])
    monkeypatch.setattr("lightsparse.analysis.rows.chunks.__defaults__", (1,))  # a query at a time
    part = against_dense(q, k, layout, v, queries=some)
    assert torch.equal(part.queries, some)
    assert torch.allclose(part.mass, whole.mass[..., some]) and torch.allclose(part.error, whole.error[..., some])


def test_a_layout_of_everything_keeps_all_and_errs_nowhere():
    _, dense, q, k, v = case("window", True, False)
    found = against_dense(q, k, dense, v)
    assert torch.allclose(found.mass, torch.ones(())) and float(found.error.max()) < 1e-5
    assert against_dense(q, k, dense).error is None


def test_the_share_kept_is_linear_in_memory_not_quadratic():
    layout = LocalWindow(64).layout(1 << 17, block=64)  # N × N would be 64 GiB in fp32
    q = torch.randn(1, 1, 1 << 17, 8)
    assert against_dense(q, q, layout, queries=4).mass.shape == (1, 1, 4)


def test_what_has_no_mass_is_refused():
    q = torch.randn(1, 1, 80, 8)
    summaries = PooledHierarchy(window=16, coarser=((None, 4),)).layout(80, block=8)
    with pytest.raises(ValueError, match="a layout with summaries has none"):
        against_dense(q, torch.randn(1, 1, summaries.num_keys, 8), summaries)
    with pytest.raises(ValueError, match="the layout is for 64 queries and 64 keys"):
        against_dense(q, q, LocalWindow(8).layout(64, block=8))
