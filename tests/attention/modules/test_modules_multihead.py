"""The drop-in against nn.MultiheadAttention: equal at density 1, and below it equal under the combined mask."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from multihead_pair import (
    F32,
    F64,
    FULL,
    MASKS,
    SPARSE,
    B,
    E,
    H,
    Multihead,
    added,
    assert_same,
    attn_mask,
    padding,
    pair,
    pattern_of,
    tokens,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import SequenceContext
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockLayout, LocalWindow


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-6)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_at_density_one_it_is_multihead_attention(
    kind: str, batch_first: bool, dtype: torch.dtype, tolerance: float
) -> None:
    n = 37
    dense, ours = pair(FULL, dtype, batch_first=batch_first)
    x = tokens(n, batch_first=batch_first, dtype=dtype)
    mask = attn_mask(kind, n, dtype=dtype)
    for padded, need, average in itertools.product((False, True), (False, True), (False, True)):
        hidden = padding(n) if padded else None
        if hidden is not None and mask is not None and mask.is_floating_point():
            hidden = added(hidden, dtype)
        call = {
            "key_padding_mask": hidden,
            "attn_mask": mask,
            "need_weights": need,
            "average_attn_weights": average,
            "is_causal": kind == "causal",
        }
        assert_same(ours, dense, (x, x, x), call, tolerance=tolerance)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_below_density_one_it_is_multihead_attention_under_the_combined_mask(kind: str, need_weights: bool) -> None:
    n = 63
    dense, ours = pair(SPARSE, batch_first=True)
    x, hidden, mask = tokens(n), padding(n), attn_mask(kind, n)
    left_out = ~pattern_of(ours, n).expand(B, H, n, n).flatten(0, 1)
    assert 0.2 < left_out.float().mean() < 0.8
    call = {"attn_mask": mask, "key_padding_mask": hidden, "need_weights": need_weights, "average_attn_weights": False}
    combined = added(left_out)
    if mask is not None:
        combined = combined + (added(mask) if mask.dtype == torch.bool else mask)
    dense_call = call | {"attn_mask": combined, "key_padding_mask": added(hidden)}
    assert_same(ours, dense, (x, x, x), call, dense_call)


def test_every_way_to_say_causal_gives_the_pattern_of_the_past() -> None:
    n = 63
    dense, ours = pair(SPARSE, batch_first=True)
    x, mask = tokens(n), attn_mask("causal", n)
    assert mask is not None
    floating = added(mask)
    hides = (~pattern_of(ours, n) | mask).expand(B, H, n, n).flatten(0, 1)
    dense_call = {"attn_mask": hides, "need_weights": False}
    explicit = floating.clone().requires_grad_()  # not recognised, since its gradient is wanted
    for call in (
        {"is_causal": True},
        {"attn_mask": mask},
        {"attn_mask": floating},
        {"attn_mask": floating, "is_causal": True},
        {"attn_mask": floating, "need_weights": True},
        {"attn_mask": explicit},
    ):
        weightless = {"need_weights": False} | call
        right = dense_call | {"need_weights": weightless["need_weights"]}
        assert_same(ours, dense, (x, x, x), weightless, right)


def test_padding_and_causal_masks_never_become_explicit_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    n, layouts = 63, []

    def watched(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **rest) -> Tensor:
        layouts.append(layout)
        return block_sparse_attention(q, k, v, layout, **rest)

    monkeypatch.setattr("lightsparse.attention.modules.multihead.block_sparse_attention", watched)
    _, ours = pair(SPARSE, batch_first=True)
    x, mask = tokens(n), attn_mask("causal", n)
    for causal in (mask, added(mask), added(mask, F32)):
        for hidden in (None, padding(n), added(padding(n))):
            ours(x, x, x, hidden, False, causal)
    assert len(layouts) == 9 and all(layout.mask.dense is None for layout in layouts)
    assert all((layout.kv_indices <= torch.arange(8)[:, None]).all() for layout in layouts)


def test_a_causal_module_is_causal_in_every_call() -> None:
    n = 63
    dense, ours = pair(SPARSE | {"causal": True}, batch_first=True)
    assert pattern_of(ours, n).triu(1).sum() == 0
    hides = (~pattern_of(ours, n)).expand(B, H, n, n).flatten(0, 1)
    x = tokens(n)
    for call in ({}, {"is_causal": True}, {"attn_mask": attn_mask("causal", n)}):
        assert_same(ours, dense, (x, x, x), call | {"need_weights": False}, {"attn_mask": hides, "need_weights": False})


def test_the_hint_is_trusted_exactly_where_pytorch_trusts_it() -> None:
    n = 21
    dense, ours = pair(FULL, batch_first=True)
    x, wrong = tokens(n), attn_mask("bool", n)
    for need, hidden in ((False, None), (True, None), (False, padding(n))):
        call = {"attn_mask": wrong, "is_causal": True, "need_weights": need, "key_padding_mask": hidden}
        assert_same(ours, dense, (x, x, x), call)


@pytest.mark.parametrize("sparse", [FULL, SPARSE], ids=["full", "sparse"])
def test_unbatched_inputs_are_a_batch_of_one(sparse: dict) -> None:
    n = 37
    for batch_first in (True, False):
        dense, ours = pair(sparse, batch_first=batch_first)
        x = tokens(n)[0].detach().requires_grad_()
        hidden, mask = padding(n)[1], attn_mask("bool 3-D", n)
        assert mask is not None
        hides = mask[:H] | ~pattern_of(ours, n)[0]
        for need, average in ((True, True), (True, False), (False, True)):
            call = {"need_weights": need, "average_attn_weights": average, "key_padding_mask": hidden}
            assert_same(ours, dense, (x, x, x), call | {"attn_mask": mask[:H]}, call | {"attn_mask": hides})


@pytest.mark.parametrize("n", [37, 48])
@pytest.mark.parametrize(("bias_kv", "zero"), [(True, False), (False, True), (True, True)])
def test_added_keys_are_read_by_every_query(bias_kv: bool, zero: bool, n: int) -> None:
    x = tokens(n)
    for sparse in (FULL, SPARSE):
        dense, ours = pair(sparse, add_bias_kv=bias_kv, add_zero_attn=zero, batch_first=True)
        left_out = ~pattern_of(ours, n).expand(B, H, n, n).flatten(0, 1)
        for need, kind in itertools.product((True, False), ("none", "bool", "float")):
            mask = attn_mask(kind, n)
            call = {"need_weights": need, "attn_mask": mask, "key_padding_mask": padding(n)}
            combined = added(left_out)
            if mask is not None:
                combined = combined + (added(mask) if mask.dtype == torch.bool else mask)
            dense_call = call | {"attn_mask": combined, "key_padding_mask": added(padding(n))}
            assert_same(ours, dense, (x, x, x), call, dense_call)


def test_other_key_and_value_widths_have_projections_of_their_own() -> None:
    n = 37
    dense, ours = pair(FULL, kdim=20, vdim=12, batch_first=True)
    assert ours.in_proj_weight is None and set(ours.state_dict()) == set(dense.state_dict())
    inputs = tokens(n), tokens(n, 20, 2), tokens(n, 12, 3)
    for need in (True, False):
        assert_same(ours, dense, inputs, {"need_weights": need})


def test_a_sequence_reads_another_at_density_one_only() -> None:
    dense, ours = pair(FULL, batch_first=True)
    for n, m in ((37, 21), (21, 70)):
        inputs = tokens(n), tokens(m, seed=2), tokens(m, seed=3)
        for kind, need in itertools.product(("none", "bool", "float 3-D", "causal"), (True, False)):
            call = {"attn_mask": attn_mask(kind, n, m), "need_weights": need}
            assert_same(ours, dense, inputs, call)
    assert_same(ours, dense, (tokens(37), *[tokens(37, seed=2)] * 2), {"need_weights": False})
    _, sparse = pair(SPARSE, batch_first=True)
    with pytest.raises(
        ValueError, match=r"query has 37 tokens and key 70; .* use nn.MultiheadAttention or density=1.0"
    ):
        sparse(tokens(37), tokens(70), tokens(70))


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 8}], ids=str)
def test_state_dicts_go_both_ways_and_the_same_seed_draws_the_same_weights(arguments: dict) -> None:
    torch.manual_seed(7)
    dense = nn.MultiheadAttention(E, H, **arguments)
    torch.manual_seed(7)
    ours = Multihead(E, H, **arguments)
    assert list(ours.state_dict()) == list(dense.state_dict())
    for name, value in dense.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    torch.manual_seed(7)
    ours._reset_parameters()
    dense.load_state_dict(ours.state_dict())
    ours.load_state_dict(dense.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


def test_a_query_without_keys_gives_zero_not_nan() -> None:
    n = 21
    for sparse in (FULL, SPARSE):
        dense, ours = pair(sparse, batch_first=True)
        x, hidden = tokens(n), torch.zeros(B, n, dtype=torch.bool)
        hidden[0] = True
        assert dense(x, x, x, key_padding_mask=hidden)[1][0].isnan().all()
        for need in (True, False):
            out, weights = ours(x, x, x, key_padding_mask=hidden, need_weights=need)
            assert torch.equal(out[0], ours.out_proj.bias.expand(n, E))
            assert weights is None or (not weights[0].any() and torch.allclose(weights[1].sum(-1), x.new_ones(n)))
            grads = torch.autograd.grad((out**2).sum(), (x, *ours.parameters()))
            assert all(grad.isfinite().all() for grad in grads) and not grads[0][0].any()


def test_a_float_padding_mask_is_added_with_its_gradient() -> None:
    n = 37
    dense, ours = pair(FULL, batch_first=True)
    x, padded = tokens(n), torch.randn(B, n, generator=torch.Generator().manual_seed(4), dtype=F64)
    padded[1, 30:] = float("-inf")
    assert_same(ours, dense, (x, x, x), {"key_padding_mask": padded, "need_weights": False})
    mask = attn_mask("bool", n)
    assert mask is not None
    call = {"key_padding_mask": padded, "need_weights": False}
    assert_same(ours, dense, (x, x, x), call | {"attn_mask": mask}, call | {"attn_mask": added(mask)})
    grads = []
    for module in (ours, dense):
        leaf = padded.clone().requires_grad_()
        out, _ = module(x, x, x, key_padding_mask=leaf, need_weights=False)
        grads.extend(torch.autograd.grad((out**3).sum(), leaf))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=0)


def test_a_learned_float_mask_gets_its_gradient() -> None:
    n = 21
    dense, ours = pair(FULL, batch_first=True)
    x, grads = tokens(n), []
    for module in (ours, dense):
        leaf = attn_mask("float", n).requires_grad_()
        out, _ = module(x, x, x, attn_mask=leaf, need_weights=False)
        grads.extend(torch.autograd.grad((out**3).sum(), leaf))
    assert grads[0].any()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only_and_drops_its_share_of_the_weights() -> None:
    n = 111
    _, ours = pair(SPARSE, dropout=0.3, batch_first=True)
    x = tokens(n)
    expected = ours.eval()(x, x, x, average_attn_weights=False)
    assert torch.equal(ours(x, x, x)[0], expected[0]), "evaluation is deterministic"
    ours.train()
    torch.manual_seed(1)
    out, weights = ours(x, x, x, average_attn_weights=False)
    kept = weights != 0
    read = expected[1] != 0
    share = 1 - kept.sum() / read.sum()
    assert abs(float(share) - 0.3) < 0.01
    torch.testing.assert_close(weights[kept], expected[1][kept] / 0.7, atol=1e-6, rtol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], out, atol=1e-6, rtol=0)
    assert not torch.allclose(ours(x, x, x)[0], out), "the next call drops others"
    assert not torch.equal(kept[0] & read[1], kept[1] & read[0]), "samples drop different weights"


def test_dropout_is_the_same_when_recomputed() -> None:
    _, ours = pair(SPARSE, dropout=0.3, batch_first=True)
    x = tokens(37)

    def loss(recompute: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        call = lambda x: ours(x, x, x, need_weights=False)[0]  # noqa: E731
        out = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
        return out, *torch.autograd.grad((out**2).sum(), (x, *ours.parameters()))

    for plain, again in zip(loss(False), loss(True), strict=True):
        assert torch.equal(plain, again)


class _Largest(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *made])
        return result


def test_without_weights_no_tensor_is_quadratic_not_even_under_padding_or_a_causal_hint() -> None:
    n = 4096
    torch.manual_seed(0)
    ours = Multihead(8, 1, batch_first=True, block=32, segment_lengths=(), dilation_rates=(), pattern=LocalWindow(33))
    x = torch.randn(1, n, 8, requires_grad=True)
    hidden = torch.arange(n)[None] > n - 100
    for call in ({}, {"is_causal": True}, {"key_padding_mask": hidden}, {"key_padding_mask": hidden.float() * -3.0}):
        with _Largest() as watch:
            ours(x, x, x, need_weights=False, **call)[0].sum().backward()
        assert watch.bytes < n * n / 8, call


def test_segments_rates_and_density_each_change_the_output() -> None:
    x = tokens(111)
    outs = []
    for change in (
        {},
        {"segment_lengths": (32, 64)},
        {"dilation_rates": (1, 4)},
        {"pattern": LocalWindow(30)},
        {"pattern": None},
        {"density": 0.6},
        {"density": 0.6, "context": 300},
        {"block": 16},
        {"causal": True},
    ):
        outs.append(pair(SPARSE | change, batch_first=True)[1](x, x, x, need_weights=False)[0])
    for a, b in itertools.combinations(outs, 2):
        assert not torch.allclose(a, b, atol=1e-3)


def test_density_is_what_was_asked() -> None:
    n = 512
    ours = Multihead(E, H, **(SPARSE | {"density": 0.35}))
    layout = ours.core.layout(n, SequenceContext(torch.arange(n)[None]), torch.device("cpu"))
    assert abs(layout.density() - 0.35) < 0.02 * 0.35


def test_it_survives_deepcopy_and_saving() -> None:
    _, ours = pair(SPARSE, batch_first=True)
    x = tokens(37)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    _, ours = pair(SPARSE, batch_first=True, dropout=0.1)
    x, hidden = tokens(37), padding(37)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    outs = []
    for module in (compiled, ours):
        torch.manual_seed(1)
        out, _ = module(x, x, x, hidden, need_weights=False, is_causal=True)
        outs.append((out, *torch.autograd.grad((out**2).sum(), x)))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_it_runs_under_autocast_and_in_bf16(need_weights: bool) -> None:
    n = 37
    for arguments in ({}, {"add_bias_kv": True}):
        dense, ours = pair(FULL, F32, batch_first=True, **arguments)
        x = tokens(n, dtype=F32)
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = ours(x, x, x, need_weights=need_weights)
        right, _ = dense(x, x, x)
        assert out.dtype == torch.bfloat16 and (weights is None or weights.dtype == torch.bfloat16)
        torch.testing.assert_close(out.float(), right, atol=0.05, rtol=0)
        half = copy.deepcopy(ours).bfloat16()
        y = x.bfloat16()
        torch.testing.assert_close(half(y, y, y, need_weights=need_weights)[0].float(), right, atol=0.05, rtol=0)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    for module in (nn.MultiheadAttention, Multihead):
        with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
            module(30, 4)
        with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
            module(0, 4)
    with pytest.raises(ValueError, match=r"dropout is 1.0; .* must lie in \[0, 1\)"):
        Multihead(E, H, dropout=1.0)
    with pytest.raises(ValueError, match="multiple of the block, 24 tokens"):
        Multihead(E, H, block=24)
    ours = Multihead(E, H, batch_first=True, **SPARSE)
    x = tokens(21, dtype=F32)
    with pytest.raises(ValueError, match=r"attn_mask is \(21, 20\); it must be \(21, 21\) or \(8, 21, 21\)"):
        ours(x, x, x, attn_mask=torch.zeros(21, 20))
    with pytest.raises(ValueError, match=r"key_padding_mask is \(21, 2\); it must be \(2, 21\)"):
        ours(x, x, x, key_padding_mask=torch.zeros(21, 2))
    with pytest.raises(ValueError, match=r"attn_mask is torch\.int64; it must be bool"):
        ours(x, x, x, attn_mask=torch.zeros(21, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"have \(32, 32, 16\) features"):
        ours(x, x, x[..., :16])
    with pytest.raises(ValueError, match="the same batch and length"):
        ours(x, x, x[:, :20])
    with pytest.raises(ValueError, match="query has batch 2 and key 1"):
        ours(x, x[:1], x[:1])
