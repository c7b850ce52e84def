"""Reused buffers change no bit of a training run, and save the allocations they are there to save."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape
from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels.workspace import Workspace, without_reuse, workspace
from lightsparse.models import ModelConfig, Transformer, context_for
from lightsparse.patterns import LocalWindow


def trained(steps: int) -> list[Tensor]:
    """Losses and final weights of a small model whose batches differ in length."""
    torch.manual_seed(0)
    config = BlockSparseConfig(block=16, segment_lengths=(32, 64), dilation_rates=(1, 2), dropout=0.1)

    def core(shape: AttentionShape) -> nn.Module:
        return BlockSparseRingDilatedAttention(config, shape)

    model = Transformer(ModelConfig(depth=2, embed_dim=32, heads=4, kv_heads=2, mlp_dim=32), core, vocab_size=11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        tokens = torch.randint(11, (2, 65 + 30 * (step % 3)), generator=torch.Generator().manual_seed(step))
        loss = model.loss_sum(model(tokens[:, :-1], context_for(tokens[:, :-1], seed=step)).hidden, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in model.parameters())]


def test_training_with_reused_buffers_equals_training_without_bit_for_bit() -> None:
    reused = trained(6)
    with without_reuse():
        anew = trained(6)
    assert all(torch.equal(a, b) for a, b in zip(reused, anew, strict=True))


def test_after_the_first_steps_no_buffer_is_allocated() -> None:
    trained(3)  # every length once
    before = workspace().allocations
    trained(6)
    assert workspace().allocations == before
    with without_reuse():
        trained(1)
    assert workspace().allocations > before


def test_results_never_share_memory_with_the_buffers() -> None:
    first = trained(1)
    copies = [tensor.clone() for tensor in first]
    trained(3)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_a_buffer_grows_to_the_largest_size_and_names_and_dtypes_do_not_share() -> None:
    space = Workspace()
    small = space.take("a", 10, torch.float32, torch.device("cpu"))
    large = space.take("a", 100, torch.float32, torch.device("cpu"))
    assert space.take("a", 50, torch.float32, torch.device("cpu")).data_ptr() == large.data_ptr() != small.data_ptr()
    assert space.take("b", 50, torch.float32, torch.device("cpu")).data_ptr() != large.data_ptr()
    assert space.take("a", 50, torch.float64, torch.device("cpu")).dtype == torch.float64
    assert space.allocations == 4


def test_a_huge_buffer_is_not_kept() -> None:
    space = Workspace()
    for _ in range(2):
        space.take("a", (128 << 20) // 4 + 1, torch.float32, torch.device("cpu"))
    assert space.allocations == 2


def test_buffers_first_made_under_inference_mode_serve_training() -> None:
    workspace().clear()
    with torch.inference_mode():
        layout = LocalWindow(20).layout(50, block=16)
        q = torch.randn(1, 1, 50, 8)
        block_sparse_attention(q, q, q, layout, backend="native")
    assert trained(1)[0] > 0
