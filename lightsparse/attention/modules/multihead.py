"""A drop-in for `nn.MultiheadAttention` that reads only the blocks of a pattern, with the exact softmax over them.

Same constructor arguments, state_dict, forward arguments and results; the sparse options are keyword-only. At density 1
it equals `nn.MultiheadAttention`; below, it equals dense attention whose `attn_mask` also hides what the pattern leaves
out. Without `attn_mask` (or with a causal one) and with need_weights=False, time and memory are those of the pattern.

Differences from `nn.MultiheadAttention`, all deliberate:
- A query with nothing to read gives 0 before the output projection (there: NaN with need_weights=True, else 0).
- is_causal=True works without an `attn_mask`.
- Query and key of different lengths need density 1: a pattern pairs positions of one sequence.
- Dropout draws one key per sample from torch's generator at each call in training and is a pure function of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.modules.call_layout import appended, every_key, is_causal_mask, masked, of_the_past
from lightsparse.kernels import Dropout, block_sparse_attention
from lightsparse.kernels.dropout import keep_scale
from lightsparse.kernels.weights import attention_weights, list_dense_rows, to_dense_weights
from lightsparse.patterns import BlockLayout, GlobalTokens, LocalWindow, Pattern
from lightsparse.utils.compat.torch import UnfusedMultiheadAttention

_NEARBY = LocalWindow(256) | GlobalTokens(4)  # tokens, as in conf/attention/block_sparse.yaml


class BlockSparseRingMultiheadDilatedAttention(UnfusedMultiheadAttention):
    """`nn.MultiheadAttention` over the union of dilated segments and `pattern`.

    embed_dim … dtype  as in nn.MultiheadAttention; dropout must be below 1
    block              tokens per block
    segment_lengths    tokens, multiples of the block; empty: only `pattern`
    dilation_rates     blocks, one per segment length
    pattern            what is read beside the segments; None: only the segments
    density            share of dense tiles: solves the pattern's integer field `solve`; 1.0 reads everything
    context            tokens the density refers to; None: the length of each call
    causal             every call is causal, whatever its masks; else a call is where is_causal or attn_mask says so

    PyTorch's encoder layers in evaluation skip their attention's forward and hand its weights to a fused dense kernel.
    This module keeps them from it, so `layer.self_attn = this` gives sparse attention in evaluation too.
    Raises what nn.MultiheadAttention raises, and ValueError for sparse options that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: int = 64,
        segment_lengths: tuple[int, ...] = (2048, 8192),
        dilation_rates: tuple[int, ...] = (4, 16),
        pattern: Pattern | None = _NEARBY,
        density: float | None = None,
        solve: str = "window",
        context: int | None = None,
        causal: bool = False,
    ):
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it is a share of the weights and must lie in [0, 1)")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        config = BlockSparseConfig(
            density=density,
            block=block,
            segment_lengths=tuple(segment_lengths),
            dilation_rates=tuple(dilation_rates),
            pattern={} if pattern is None else pattern,
            solve=solve,
        )
        shape = AttentionShape(num_heads, num_heads, self.head_dim, embed_dim, causal=causal, context=context)
        self.core = BlockSparseRingDilatedAttention(config, shape)  # has no parameters: chooses the blocks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention outputs in the shape of query, and with need_weights the weights.

        query, key, value     [L, B, E], [S, B, kdim], [S, B, vdim]; batch_first: [B, L, E] …; unbatched: [L, E] …
        key_padding_mask      [B, S] (unbatched [S]): True hides the key from all queries; float is added to its scores.
                              Bool, and float of only 0 and −inf, cost nothing
        attn_mask             [L, S] or [B·H, L, S]: True hides the pair; float is added to the score, differentiable.
                              A causal one is recognised and costs nothing more than being read
        need_weights          also return the weights, [B, L, S] (unbatched [L, S]), after dropout; quadratic
        average_attn_weights  False: the weights per head, [B, H, L, S]
        is_causal             as in PyTorch a hint that attn_mask is causal, trusted where neither padding nor weights
                              are asked for; without attn_mask it makes the call causal
        With add_bias_kv or add_zero_attn the weights have a column more for each. Raises ValueError for shapes that do
        not fit, for S ≠ L below density 1, and for nested tensors with masks or in cross-attention.
        """
        if query.is_nested:
            if key is not query or value is not query or key_padding_mask is not None or attn_mask is not None:
                raise ValueError("query is nested; that is for self-attention without masks, pad it and use a mask")
            return self._of_nested(query, need_weights, average_attn_weights, is_causal)
        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            query, key, value = (x.unsqueeze(batch_dim) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        self._check(query, key, value, key_padding_mask, attn_mask)

        q, k, v = self._heads(query, key, value)
        sources = k.shape[2]
        causal = is_causal and (attn_mask is None or (key_padding_mask is None and not need_weights))
        if attn_mask is not None and (causal or is_causal_mask(attn_mask)):
            attn_mask, causal = None, True
        layout = masked(
            self._layout(q.shape[2], sources, causal, q.device), self.num_heads, key_padding_mask, attn_mask
        )
        extra = (self.bias_k is not None) + self.add_zero_attn  # keys that every query reads
        if extra:
            k, v = self._append(k, v, layout.kv_block)
            layout = appended(layout, extra)
        dropout = None
        if self.training and self.dropout:
            dropout = Dropout(self.dropout, torch.randint(1 << 62, (len(q),), device=q.device))

        weights = None
        if need_weights or (layout.mask.dense is not None and layout.mask.dense.requires_grad):
            # Written out: the weights are quadratic anyway, and they, v and a float mask all get their gradients.
            weights = _dense_weights(q, k, layout, dropout)
            out = weights @ v
        else:
            out = block_sparse_attention(q, k, v, layout, dropout=dropout)
        out = out.transpose(1, 2).flatten(2)
        out = self.out_proj(out if self.batch_first else out.transpose(0, 1))
        if not need_weights:
            return out if batched else out.squeeze(batch_dim), None
        assert weights is not None
        if extra:  # between the keys and these lies padding up to a whole block
            weights = torch.cat([weights[..., :sources], weights[..., -extra:]], -1)
        weights = weights.mean(1) if average_attn_weights else weights
        return (out, weights) if batched else (out.squeeze(batch_dim), weights[0])

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        if not query.dim() == key.dim() == value.dim() == 3 or key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"query is {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; all are 3-D, "
                "or all 2-D, and key and value have the same batch and length"
            )
        widths = query.shape[2], key.shape[2], value.shape[2]
        if widths != (self.embed_dim, self.kdim, self.vdim):
            raise ValueError(
                f"query, key, value have {widths} features; embed_dim, kdim, vdim are "
                f"{(self.embed_dim, self.kdim, self.vdim)}"
            )
        batch_dim = 0 if self.batch_first else 1
        batch, nq, nkv = query.shape[batch_dim], query.shape[1 - batch_dim], key.shape[1 - batch_dim]
        if key.shape[batch_dim] != batch:
            raise ValueError(f"query has batch {batch} and key {key.shape[batch_dim]}; they must be the same")
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [(batch, nkv)]),
            ("attn_mask", attn_mask, [(nq, nkv), (batch * self.num_heads, nq, nkv)]),
        ):
            if mask is not None and tuple(mask.shape) not in shapes:
                raise ValueError(f"{name} is {tuple(mask.shape)}; it must be {' or '.join(map(str, shapes))}")
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"{name} is {mask.dtype}; it must be bool (True hides) or floating-point (added)")

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v projected: [B, H, N, D] each."""
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            packed = self.in_proj_weight is not None
            weights = (
                self.in_proj_weight.chunk(3) if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).permute(order) for x in projected]

    @torch.compiler.disable  # a table from numbers: nothing to compile
    def _layout(self, nq: int, nkv: int, causal: bool, device: torch.device) -> BlockLayout:
        """What the pattern allows, cut to the past where the call is causal."""
        longest = max(nq, nkv)
        layout = self.core.layout(longest, SequenceContext(torch.arange(longest)[None]), device)
        if nq != nkv:
            if layout.density() < 1.0:
                raise ValueError(
                    f"query has {nq} tokens and key {nkv}; a sparse pattern pairs positions of one sequence, for "
                    "attention between two use nn.MultiheadAttention or density=1.0"
                )
            causal = causal or self.core.shape.causal
            layout = every_key(nq, nkv, self.core.block, device)
        return of_the_past(layout) if causal and not layout.mask.causal else layout

    def _append(self, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """k and v with add_bias_kv's and add_zero_attn's, in a block of their own."""
        batch, heads, nkv, dim = k.shape
        padding, zero = (k.new_zeros(batch, heads, n, dim) for n in (-nkv % block, 1))
        ks, vs = [k, padding], [v, padding]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, bias in ((ks, self.bias_k), (vs, self.bias_v)):
                parts.append(bias.view(1, heads, 1, dim).to(k.dtype).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            ks.append(zero)
            vs.append(zero)
        return torch.cat(ks, 2), torch.cat(vs, 2)

    def _of_nested(
        self, x: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention over [B, j, E], j by sample, which nn.TransformerEncoder makes of padded input in evaluation.

        The output is nested, the weights are padded. The pattern is laid over the longest sample.
        """
        if not self.batch_first or x.layout != torch.strided:
            raise ValueError("query is nested; that needs batch_first=True and layout=torch.strided")
        lengths = [len(sample) for sample in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        position = torch.arange(padded.shape[1], device=x.device)
        hidden = position >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self.forward(padded, padded, padded, hidden, need_weights, None, average_attn_weights, is_causal)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths, strict=True)]), weights


def _dense_weights(q: Tensor, k: Tensor, layout: BlockLayout, dropout: Dropout | None) -> Tensor:
    """Weights after dropout, in q's dtype: [B, H, Nq, Nkv]."""
    listed = list_dense_rows(layout)
    weights = to_dense_weights(attention_weights(q, k, listed), listed).to(q.dtype)
    if dropout is None:
        return weights
    heads, keys = (torch.arange(n, device=q.device) for n in (q.shape[1], k.shape[2]))
    return weights * keep_scale(dropout, heads, layout.mask.q_pos, keys[None, None], q.dtype)
