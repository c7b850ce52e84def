"""The drop-in inside nn.TransformerEncoderLayer and nn.TransformerEncoder: sparse in training and in evaluation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from multihead_pair import F32, SPARSE, B, E, H, Multihead, added, padding, pattern_of, tokens
from torch import Tensor, nn


def encoder_layer(sparse: dict | None, **arguments) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True, **arguments)
    if sparse is not None:
        ours = Multihead(E, H, batch_first=True, bias=layer.self_attn.in_proj_bias is not None, **sparse)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
    return layer


def hides_of(n: int) -> Tensor:
    """The mask that makes a dense encoder layer the sparse one: [B·H, n, n]."""
    left_out = ~pattern_of(Multihead(E, H, **SPARSE), n).expand(B, H, n, n).flatten(0, 1)
    return added(left_out, F32)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_layer_stays_sparse_in_evaluation(padded: bool, norm_first: bool) -> None:
    n = 63
    layer, dense = encoder_layer(SPARSE, norm_first=norm_first), encoder_layer(None, norm_first=norm_first)
    x, hidden = tokens(n, dtype=F32).detach(), padding(n) if padded else None
    right = dense.train()(x, hides_of(n), None if hidden is None else added(hidden, F32))
    layer.train()
    torch.testing.assert_close(layer(x, src_key_padding_mask=hidden), right, atol=1e-5, rtol=0)
    layer.eval()
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            out = layer(x, src_key_padding_mask=hidden)
            torch.testing.assert_close(out, right.detach(), atol=1e-5, rtol=0)
            densely = dense.eval()(x, src_key_padding_mask=hidden)
            assert not torch.allclose(out, densely, atol=1e-2), "the two differ, so the test can fail"


@pytest.mark.parametrize("swapped", ["before", "after", "second layer only"])
def test_an_encoder_stays_sparse_in_evaluation_whenever_its_layers_were_swapped(swapped: str) -> None:
    """Swapped after construction, nn.TransformerEncoder makes nested tensors of padded input: they are understood."""
    n = 63
    x = tokens(n, dtype=F32).detach()
    hidden = torch.zeros(B, n, dtype=torch.bool)
    hidden[0, n - 3 :] = hidden[1, n // 2 :] = True
    sparse, dense = encoder_layer(SPARSE), encoder_layer(None)
    if swapped == "before":
        with pytest.warns(UserWarning, match="use_nested_tensor is False because"):
            encoder = nn.TransformerEncoder(sparse, 2)
    else:
        encoder = nn.TransformerEncoder(dense, 2)
        for layer in encoder.layers[1 if swapped == "second layer only" else 0 :]:
            layer.self_attn = copy.deepcopy(sparse.self_attn)
    masked = nn.TransformerEncoder(dense, 2, enable_nested_tensor=False)
    mask = hides_of(n)

    def by_hand(first_is_dense: bool) -> Tensor:
        padded = added(hidden, F32)
        y = masked.layers[0](x, None if first_is_dense else mask, padded)
        return masked.layers[1](y, mask, padded)

    right = by_hand(swapped == "second layer only")[~hidden].detach()
    encoder.eval()
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
            out = encoder(x, src_key_padding_mask=hidden)
            assert out.shape == x.shape
            torch.testing.assert_close(out[~hidden], right, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.train()(x, src_key_padding_mask=hidden)[~hidden], right, atol=1e-5, rtol=0)


def test_an_encoder_recognises_causality_and_trains_after_evaluation() -> None:
    n = 63
    layer, dense = encoder_layer(SPARSE), encoder_layer(None)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    causal = nn.Transformer.generate_square_subsequent_mask(n)
    x = tokens(n, dtype=F32)
    masked = hides_of(n) + causal
    right = nn.TransformerEncoder(dense, 2, enable_nested_tensor=False)(x, mask=masked)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(x, mask=causal), right.detach(), atol=1e-5, rtol=0)
    out = encoder.train()(x, mask=causal)
    torch.testing.assert_close(out, right, atol=1e-5, rtol=0)
    (grad,), (right_grad,) = (torch.autograd.grad((y**2).sum(), x) for y in (out, right))
    torch.testing.assert_close(grad, right_grad, atol=1e-4, rtol=0)


def test_a_fused_path_that_reached_it_would_be_an_error() -> None:
    layer = encoder_layer(SPARSE).eval()
    layer.self_attn._qkv_same_embed_dim = True  # as if a later PyTorch asked for something else
    with torch.no_grad(), pytest.raises(RuntimeError, match="set_fastpath_enabled"):
        layer(tokens(21, dtype=F32).detach())


def test_nested_tensors_with_masks_or_other_keys_are_refused() -> None:
    ours = Multihead(E, H, batch_first=True, **SPARSE).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        nested = torch.nested.nested_tensor([torch.randn(5, E), torch.randn(3, E)])
    with torch.no_grad(), pytest.raises(ValueError, match="query is nested"):
        ours(nested, nested, nested, key_padding_mask=padding(5))
    with torch.no_grad(), pytest.raises(ValueError, match="batch_first=True"):
        Multihead(E, H, **SPARSE)(nested, nested, nested)
