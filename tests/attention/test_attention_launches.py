"""Wide chunks, as on CUDA: selections are the same, no value is read on the way, and a layer launches few kernels.

Tensors on the meta device have shapes and no values. What runs on them reads none, so that the host never waits for the
device, and shapes alone say what is dispatched: the count at 65,536 tokens is taken at 65,536 tokens. That the meta
device is a fair witness is tested at 2,048, where the same layer runs on a CPU in chunks as wide as CUDA's.
"""

from collections import Counter
from contextlib import nullcontext

import battery
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.moba import MobaAttention, MobaConfig
from lightsparse.attention.nsa import NsaAttention, NsaConfig
from lightsparse.attention.pooling.nsa_compress import complete
from lightsparse.attention.selection import nsa_select, row_parts, top_blocks
from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.torch_ops import lists, per_query
from lightsparse.patterns import interval_mask

LONG, SHORT = 1 << 16, 1 << 11
MOST = 6000  # launches of a layer, forward and backward
HEADS, DIM = 8, 64


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(chunk_sizes, "is_wide", lambda device: True)


class Launches(TorchDispatchMode):
    """What is dispatched inside, views left out: they launch nothing."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and function is not torch.ops.aten.detach.default:
            self.of[str(function)] += 1
        return result


class PerQuery(torch.autograd.Function):
    """The backend without its operator, which would hide from the meta device what it does."""

    @staticmethod
    def forward(ctx, q, k, v, layout):
        ctx.layout = layout
        out, lse = per_query.forward(q, k, v, layout, q.shape[-1] ** -0.5, None, None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        return *per_query.backward(grad_out, None, out, lse, q, k, v, ctx.layout, scale, None, None)[:3], None


def launches(variant: str, n: int, device: str, monkeypatch, dtype: torch.dtype = torch.bfloat16) -> Counter[str]:
    """Of a layer's choice and of its attention to what is chosen, forward and backward.

    NSA's other two branches are layouts in tiles, which another backend serves in a kernel each.
    """
    monkeypatch.setattr(
        row_parts, "sharded_attention", lambda q, k, v, layout, *_, **__: PerQuery.apply(q, k, v, layout)
    )
    kv_heads = {"moba": HEADS, "nsa": HEADS // 4}[variant]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device does not know
    shape = AttentionShape(HEADS, kv_heads, DIM, HEADS * DIM, context=n)
    ctx = SequenceContext.plain(n, device=torch.device(device))

    def leaf(heads: int) -> Tensor:
        return torch.ones(1, heads, n, DIM, dtype=dtype, device=device).requires_grad_()

    q, k, v = leaf(HEADS), leaf(kv_heads), leaf(kv_heads)
    with Launches() as counted:
        if variant == "moba":
            core = MobaAttention(MobaConfig(), shape)
            out = core._sparse(q, k, v, core.scored(q, k, ctx), n, ctx)[0]
        else:
            core = NsaAttention(NsaConfig(), shape)
            summaries = complete(n, core.options.compress_block, core.options.compress_stride)
            keys = torch.ones(1, kv_heads, summaries, DIM, device=device)
            out = core._selected(q, k, v, keys, n, ctx).out
        out.backward(torch.ones_like(out))
    return counted.of


@pytest.mark.parametrize("variant", ["moba", "nsa"])
def test_a_layer_at_64k_launches_few_kernels_and_waits_for_none(variant, monkeypatch):
    assert launches(variant, LONG, "meta", monkeypatch).total() < MOST


LAUNCHED_BY_TRITON = {"moba": (300, 400), "nsa": (600, 400)}  # forward, backward


@pytest.mark.parametrize("variant", ["moba", "nsa"])
def test_a_layer_at_64k_launches_some_hundred_kernels_under_triton(variant, monkeypatch):
    """Its own are counted as they are launched, the others as PyTorch dispatches them.

    NSA's forward has eight chunks of scores, each of some forty operations before its blocks are chosen.
    """
    pytest.importorskip("triton")
    from lightsparse.kernels.triton import call, tables

    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, layout):
            ctx.layout = layout
            out, lse = call.forward(q, k, v, layout, 0.1, None, None)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            q, k, v, out, lse = ctx.saved_tensors
            return *call.backward(grad_out, None, out, lse, q, k, v, ctx.layout, 0.1, None, None)[:3], None

    for module, names in {
        call: "rows_forward rows_backward columns_forward columns_backward add_segments merge_outputs "
        "merge_query_gradients",
        tables: "_rank_in_chunk _place",
    }.items():
        for name in names.split():
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setitem(globals(), "PerQuery", Attention)
    at_backward, backward = [], torch.Tensor.backward

    class Counted(Launches):
        def __enter__(self):
            monkeypatch.setattr(
                torch.Tensor,
                "backward",
                lambda *given: at_backward.append(self.of.total() + len(launched)) or backward(*given),
            )
            return super().__enter__()

    monkeypatch.setitem(globals(), "Launches", Counted)
    total = launches(variant, LONG, "meta", monkeypatch).total() + len(launched)
    forward_most, backward_most = LAUNCHED_BY_TRITON[variant]
    assert {"columns_forward", "merge_outputs", "columns_backward", "merge_query_gradients"} <= set(launched)
    assert at_backward[0] < forward_most and total - at_backward[0] < backward_most


def test_lists_walked_by_query_are_not_cut_to_the_size_of_parts_that_they_do_not_have():
    """DSA's single keys: 512 for each query, gathered. Cut to the size of parts these would be 19,000 launches."""
    q, k, v = (torch.ones(1, h, LONG, DIM, dtype=torch.bfloat16, device="meta").requires_grad_() for h in (8, 2, 2))
    table = torch.empty(1, LONG, 512, dtype=torch.int32, device="meta")
    with Launches() as counted:
        out = PerQuery.apply(q, k, v, row_parts.single_rows(table, interval_mask(LONG, device="meta")))
        out.backward(torch.ones_like(out))
    assert counted.of.total() < 12_000


@pytest.mark.parametrize("top_k", [2, 8, 64])
def test_however_many_blocks_are_chosen_none_is_looked_at(top_k):
    q, means = torch.empty(1, 2, 4096, 16, device="meta"), torch.empty(1, 2, 128, 16, device="meta")
    own = torch.arange(4096, device="meta") // 32
    assert top_blocks.top_blocks(q, means, own, top_k, top_k).shape == (1, 2, 4096, top_k)


@pytest.mark.parametrize("variant", ["moba", "nsa"])
def test_on_the_meta_device_a_layer_launches_what_it_launches_on_values(variant, wide, monkeypatch):
    on_meta, on_cpu = (launches(variant, SHORT, device, monkeypatch, torch.float32) for device in ("meta", "cpu"))
    assert not on_cpu - on_meta
    assert (on_meta - on_cpu).keys() <= {"aten.scalar_tensor.default"}  # a number that a CPU takes as it is


@pytest.mark.parametrize("variant", ["moba", "nsa"])
def test_a_layer_at_2048_in_as_many_chunks_as_64k_has_launches_as_few(variant, wide, monkeypatch):
    """64k has 32 times the tokens, and so 32 times the lists, tiles and parts; scores for the choice, which grow with
    tokens × blocks, are 32 × 32 times as many. Chunks smaller by as much make the short layer walk as the long one
    does, on values. No operation but a chunk's is repeated.
    """
    at_64k = launches(variant, LONG, "meta", monkeypatch, torch.float32)
    times = LONG // SHORT
    for module, name in ((per_query, "_WIDE_PARTS"), (per_query, "_WIDE_SCORES"), (lists, "_WIDE_NUMBERS")):
        monkeypatch.setattr(module, name, getattr(module, name) // times)
    for module in (top_blocks, nsa_select):
        monkeypatch.setattr(module, "_WIDE_SCORES", module._WIDE_SCORES // times**2)
    found = launches(variant, SHORT, "cpu", monkeypatch, torch.float32)
    assert found.total() < MOST
    assert found.total() == pytest.approx(at_64k.total(), rel=0.05)


@pytest.mark.parametrize("documents", [None, (40, 64)])
@pytest.mark.parametrize("name", ["moba", "nsa", "seer", "dsa", "csa"])
def test_wide_chunks_choose_the_same_and_give_the_same_numbers(name, documents, monkeypatch):
    """With small heads and batches, more blocks to choose than are found one by one included."""
    shape = battery.Shape(111, 2, 4, 2, 16)
    variant = next(v for v in battery.variants() if v.name == name)
    monkeypatch.setattr(top_blocks, "_WIDE_ONE_BY_ONE", 1)
    found = []
    for is_wide in (False, True):
        monkeypatch.setattr(chunk_sizes, "is_wide", lambda device, w=is_wide: w)
        torch.manual_seed(0)
        core, given = (
            variant.core(shape, causal=True).double().train(),
            battery.Inputs.random(shape, dtype=torch.float64),
        )
        given = given.leaves()
        ids = None if documents is None else battery.documents_at(shape.n, *documents, batch=shape.batch)
        result = core(*given.tensors()[:3], x=given.x, ctx=battery.context(shape.n, ids))
        loss = result.out.sin().sum() + (0 if result.aux_loss is None else result.aux_loss)
        grads = torch.autograd.grad(loss, (*given.tensors(), *core.parameters()), allow_unused=True)
        kept = [x for x in grads if x is not None]
        found.append([result.choice, result.out, *result.stats.values(), *kept])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_without_a_look_the_highest_blocks_are_the_same_equal_ones_to_the_lower(most, ties, monkeypatch):
    g = torch.Generator().manual_seed(3)
    q, means = torch.randn(2, 4, 100, 8, generator=g), torch.randn(2, 2, 25, 8, generator=g)
    if ties:
        q, means = q.sign(), means.sign()
    own = torch.arange(100) // 4
    right = top_blocks.top_blocks(q, means, own, most + 1, most + 1)
    monkeypatch.setattr(chunk_sizes, "is_wide", lambda device: True)
    assert torch.equal(top_blocks.top_blocks(q, means, own, most + 1, most + 1), right)
    monkeypatch.setattr(top_blocks, "_WIDE_SCORES", 999)
    assert torch.equal(top_blocks.top_blocks(q, means, own, most + 1, most + 1), right)
