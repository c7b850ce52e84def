"""One layer of the decoder: attention and an MLP, each on a normed copy of the residual stream (Llama).

Parameter names are those of Hugging Face's Llama and Qwen3, so that weights pass both ways by name.

Shapes: B batch, N tokens, E embed_dim, H heads, D head_dim, M mlp_dim.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionCore, AttentionResult, SequenceContext
from lightsparse.kernels.compute_dtype import as_autocast, keeps_fp32
from lightsparse.models.cache import KVCache
from lightsparse.models.chunked import map_chunks
from lightsparse.models.dropout import dropped
from lightsparse.models.offload import Keep, kept_by
from lightsparse.models.recompute import Recomputed
from lightsparse.models.rope import Rotation
from lightsparse.utils.compat.torch import silu_backward_

INIT_STD = 0.02  # GPT-2's; matrices that write to the residual stream take INIT_STD / √(2 · depth)


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019, arXiv 1910.07467) over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # nn.RMSNorm leaves the fused kernel when autocast hands it a bf16 x and an fp32 weight.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Matrix(nn.Linear):
    """nn.Linear whose products stay in fp32 under autocast where the CPU gains nothing from bf16 (compute_dtype.py)."""

    def forward(self, input: Tensor) -> Tensor:
        if not keeps_fp32(input.device):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


def matrix(inputs: int, outputs: int, std: float = INIT_STD, *, bias: bool = False) -> nn.Linear:
    """A linear map, its weights drawn from N(0, std²), its bias, if any, 0."""
    linear = Matrix(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class SelfAttention(nn.Module):
    """Projections, rotation and cache around an attention core.

    q, k and v stay separate matrices: Muon orthogonalises each alone, and one joint product was not faster
    (2048 tokens, E 512, 8 and 2 heads of 64, one thread).
    """

    def __init__(self, core: AttentionCore, *, qk_norm: bool, qkv_bias: bool, eps: float, out_std: float):
        super().__init__()
        shape = core.shape
        self.head_dim = shape.head_dim
        self.q_proj = matrix(shape.embed_dim, shape.heads * shape.head_dim, bias=qkv_bias)
        self.k_proj = matrix(shape.embed_dim, shape.kv_heads * shape.head_dim, bias=qkv_bias)
        self.v_proj = matrix(shape.embed_dim, shape.kv_heads * shape.head_dim, bias=qkv_bias)
        self.o_proj = matrix(shape.heads * shape.head_dim, shape.embed_dim, out_std)
        self.q_norm = RMSNorm(shape.head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, eps) if qk_norm else nn.Identity()
        self.core = core

    def forward(
        self, x_BNE: Tensor, rotation: Rotation | None, ctx: SequenceContext, cache: KVCache | None
    ) -> tuple[Tensor, AttentionResult]:
        """The attended tokens [B, N, E] and what the core reports; rotation is None where positions are learned."""
        q, k, v = (part_BNHD.transpose(1, 2) for part_BNHD in self.heads(x_BNE, rotation))
        if cache is not None:
            k, v, cached_block_ids = cache.append(k, v)
            ctx = replace(ctx, cached_block_ids=cached_block_ids)
        result: AttentionResult = self.core(q, k, v, x=x_BNE, ctx=ctx)
        return self.o_proj(result.out.transpose(1, 2).flatten(2)), result

    def heads(self, x_BNE: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, H, D], keys and values [B, N, Hkv, D], normed and rotated, in the dtype of the attention."""
        q_BNHD = self.q_proj(x_BNE).unflatten(-1, (-1, self.head_dim))
        k_BNHD = self.k_proj(x_BNE).unflatten(-1, (-1, self.head_dim))
        v_BNHD = self.v_proj(x_BNE).unflatten(-1, (-1, self.head_dim))
        q_BNHD, k_BNHD = self.q_norm(q_BNHD), self.k_norm(k_BNHD)
        if rotation is not None:
            q_BNHD, k_BNHD = rotation.apply(q_BNHD), rotation.apply(k_BNHD)
        return as_autocast(q_BNHD), as_autocast(k_BNHD), as_autocast(v_BNHD)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, embed_dim: int, mlp_dim: int, out_std: float):
        super().__init__()
        self.gate_proj = matrix(embed_dim, mlp_dim)
        self.up_proj = matrix(embed_dim, mlp_dim)
        self.down_proj = matrix(mlp_dim, embed_dim, out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedSilu(torch.autograd.Function):
    """silu(gate) · up, bit for bit. Keeps two tensors for the backward where autograd would keep three.

    Measured (8192 × 1408, fp32, one thread): forward + backward in 0.75 × the time of F.silu(gate) * up.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_backward_(grad * up, gate), F.silu(gate).mul_(grad)


class Gelu(nn.Module):
    """down(gelu(up(x))): GPT-2's MLP, without its biases."""

    def __init__(self, embed_dim: int, mlp_dim: int, out_std: float):
        super().__init__()
        self.up_proj = matrix(embed_dim, mlp_dim)
        self.down_proj = matrix(mlp_dim, embed_dim, out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


MLPS: dict[str, type[nn.Module] | None] = {"swiglu": SwiGLU, "gelu": Gelu, "none": None}


class LayerOutput(NamedTuple):
    x: Tensor  # [B, N, E] the residual stream
    aux_loss: Tensor | None
    stats: dict[str, Tensor]
    choice: Tensor | None


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    depth       layers of the model: the more write to the stream, the smaller each starts
    mlp         swiglu, gelu, or none: attention alone
    dropout     share of what each half adds that is dropped in training
    activation_checkpointing
                keep only the layer's input and recompute the rest in the backward pass (recompute.py); with dropout the
                input of each half. Where inputs are kept is said at each pass
    chunk       tokens the MLP takes at a time
    """

    def __init__(
        self,
        core: AttentionCore,
        *,
        depth: int,
        mlp: str,
        mlp_dim: int,
        dropout: float,
        qk_norm: bool,
        qkv_bias: bool,
        eps: float,
        activation_checkpointing: bool,
        chunk: int,
    ):
        super().__init__()
        embed_dim, out_std = core.shape.embed_dim, INIT_STD / math.sqrt(2 * depth)
        self.activation_checkpointing, self.chunk, self.dropout = activation_checkpointing, chunk, dropout
        self.site = 2 * core.shape.layer + 1
        self.input_layernorm = RMSNorm(embed_dim, eps)
        self.self_attn = SelfAttention(core, qk_norm=qk_norm, qkv_bias=qkv_bias, eps=eps, out_std=out_std)
        make_mlp = MLPS[mlp]
        self.mlp = None
        if make_mlp is not None:
            self.post_attention_layernorm = RMSNorm(embed_dim, eps)
            self.mlp = make_mlp(embed_dim, mlp_dim, out_std)

    def forward(
        self,
        x_BNE: Tensor,
        rotation: Rotation | None,
        ctx: SequenceContext,
        cache: KVCache | None = None,
        keep: Keep | None = None,
    ) -> LayerOutput:
        """keep takes what activation checkpointing keeps until the backward pass; None = it stays on the device."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        drops = self.training and self.dropout > 0  # it must know which tokens it has: not in pieces
        if self.activation_checkpointing and cache is None and not drops and not torch.compiler.is_compiling():
            y_BNE, result = Recomputed(self, rotation, ctx, keep)(x_BNE)
            return LayerOutput(y_BNE, result.aux_loss, result.stats, result.choice)
        # The halves are recomputed apart: around both, the MLP's chunks would be computed three times. The generator
        # state is not kept because all randomness of a layer is a function of ctx.
        if recompute and cache is None:
            with nullcontext() if keep is None else kept_by(keep):
                attended: LayerOutput = checkpoint(
                    self._attend, x_BNE, rotation, ctx, cache, use_reentrant=False, preserve_rng_state=False
                )
        else:
            attended = self._attend(x_BNE, rotation, ctx, cache)
        if self.mlp is None:
            return attended
        if drops:  # outside of the chunks
            with nullcontext() if keep is None else kept_by(keep):
                added_BNE = map_chunks(self.feed_forward, attended.x, self.chunk, recompute=recompute)
            return attended._replace(x=attended.x + dropped(added_BNE, self.dropout, self.site + 1, ctx))
        x_BNE = map_chunks(self._with_feed_forward, attended.x, self.chunk, recompute=recompute)
        return attended._replace(x=x_BNE)

    def _attend(
        self, x_BNE: Tensor, rotation: Rotation | None, ctx: SequenceContext, cache: KVCache | None
    ) -> LayerOutput:
        out_BNE, result = self.self_attn(self.input_layernorm(x_BNE), rotation, ctx, cache)
        if self.training and self.dropout:
            out_BNE = dropped(out_BNE, self.dropout, self.site, ctx)
        return LayerOutput(x_BNE + out_BNE, result.aux_loss, result.stats, result.choice)

    @property
    def mlp_parts(self) -> tuple[nn.Module, ...]:
        """The modules of the second half."""
        return () if self.mlp is None else (self.post_attention_layernorm, self.mlp)

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to x […, E]."""
        assert self.mlp is not None
        return self.mlp(self.post_attention_layernorm(x))

    def _with_feed_forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x)
