"""The decoder: a Llama-style transformer whose attention is chosen by config.

`depth` is the one dial of its size; widths that are null follow from it. `layer_pattern` says which layers use the
chosen attention. Nothing here holds the logits or the MLP's intermediates of a whole long sequence: see chunked.py.

Shapes: B batch, N tokens, E embed_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.models.cache import KVCache
from lightsparse.models.chunked import cross_entropy_sum, token_cross_entropy
from lightsparse.models.dropout import dropped
from lightsparse.models.layer_pattern import check_layers, common_core
from lightsparse.models.layers import INIT_STD, MLPS, Layer, RMSNorm, SelfAttention, matrix
from lightsparse.models.offload import KeptInputs, copies_of
from lightsparse.models.rope import RopeConfig, RotaryEmbedding


class Widths(NamedTuple):
    embed_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """Size and form of the model. Null widths follow from depth; `widths` has the numbers."""

    depth: int = 4  # layers
    embed_dim: int | None = None  # null: 64 · depth
    heads: int | None = None  # query heads; null: embed_dim / head_dim
    kv_heads: int | None = None  # key/value heads, divides heads; null: heads
    head_dim: int | None = None  # null: embed_dim / heads where heads is given, else 64
    mlp_dim: int | None = None  # null: 8/3 · embed_dim, rounded up to a multiple of 64
    mlp: Literal["swiglu", "gelu", "none"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"  # learned: a vector per position of data.context, added once
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = True  # RMSNorm on each head's query and key
    qkv_bias: bool = False  # biases on queries, keys and values, as in Qwen2
    tie_embeddings: bool = False  # the output matrix is the embedding
    dropout: float = 0.0  # share dropped in training of the embeddings and of what attention and MLP add
    layer_pattern: str = "S"  # repeated over the depth: S the chosen attention, D dense, L local
    local_window: int | None = None  # tokens that an L layer reads, the own one included; null: there is none
    norm_eps: float = 1e-6
    # Keep only the residual stream between layers, recompute the layers in the backward pass; offload = keep it in main
    # memory (CUDA only; see offload.py).
    activation_checkpointing: bool | Literal["offload"] = False
    chunk: int = 8192  # tokens at a time in the MLP and the loss; above it they are recomputed chunk by chunk

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "heads", "kv_heads", "head_dim", "mlp_dim", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        for name, choices in (("mlp", tuple(MLPS)), ("positions", ("rope", "learned"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if not isinstance(self.activation_checkpointing, bool) and self.activation_checkpointing != "offload":
            raise ValueError(
                f"model.activation_checkpointing is {self.activation_checkpointing!r}; "
                "it must be true or false or offload"
            )
        if self.activation_checkpointing == "offload" and self.depth == 1:
            raise ValueError(
                "model.activation_checkpointing is offload and model.depth is 1, whose only layer keeps its input on "
                "the device; use model.activation_checkpointing=true"
            )
        if self.positions == "learned" and self.rope != RopeConfig():
            raise ValueError("model.positions is learned, which does not read model.rope; leave that at its defaults")
        if self.mlp == "none" and self.mlp_dim is not None:
            raise ValueError(f"model.mlp_dim is {self.mlp_dim} and model.mlp is none; leave mlp_dim out")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout is {self.dropout}; it is a share and must lie in [0, 1)")
        if not self.norm_eps > 0:
            raise ValueError(f"model.norm_eps is {self.norm_eps}; it must be above 0 (Llama uses 1e-6)")
        check_layers(self.layer_pattern, self.local_window)
        if len(self.layer_pattern) > self.depth:
            raise ValueError(
                f"model.layer_pattern is {self.layer_pattern!r}, longer than model.depth {self.depth}; "
                "shorten it or raise the depth"
            )
        embed_dim, heads, kv_heads, head_dim, _ = self.widths
        if self.head_dim is None and self.heads is not None and embed_dim % heads:
            raise ValueError(f"model.embed_dim is {embed_dim} and model.heads {heads}; heads must divide embed_dim")
        if self.heads is None and embed_dim % head_dim:
            raise ValueError(
                f"model.embed_dim is {embed_dim}, no multiple of head_dim {head_dim}; set model.heads or model.head_dim"
            )
        if head_dim % 2 and self.positions == "rope":
            raise ValueError(f"head_dim is {head_dim}; RoPE rotates pairs, so it must be even: set model.head_dim")
        if self.rope.scaling == "ntk" and head_dim == 2:
            raise ValueError("model.rope.scaling is ntk with head_dim 2; ntk needs a head_dim of at least 4")
        if heads % kv_heads:
            raise ValueError(f"model.heads is {heads} and model.kv_heads is {kv_heads}; kv_heads must divide heads")

    @property
    def widths(self) -> Widths:
        """All widths as numbers, those left null derived from depth."""
        embed_dim = self.embed_dim or 64 * self.depth
        head_dim = self.head_dim or (embed_dim // self.heads if self.heads else 64)
        heads = self.heads or max(1, embed_dim // head_dim)
        mlp_dim = self.mlp_dim or math.ceil(8 * embed_dim / 3 / 64) * 64
        return Widths(embed_dim, heads, self.kv_heads or heads, head_dim, mlp_dim)

    @property
    def layers(self) -> str:
        """One letter per layer, the first layer first."""
        return (self.layer_pattern * self.depth)[: self.depth]


@dataclass
class ModelOutput:
    hidden: Tensor  # [B, N, E] after the final norm
    aux_loss: Tensor | None  # scalar, the sum over layers
    # The mean over the layers that report them. But while decoding there are `density`, over all layers, and
    # `chosen_density`, over the S layers, if any.
    stats: dict[str, Tensor]
    choices: list[Tensor]  # tables that layers chose from their input (AttentionResult.choice), in order


def context_for(
    tokens_BN: Tensor,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    seed: int = 0,
    q_start: int = 0,
) -> SequenceContext:
    """The context of a plain pass over `tokens_BN`, which stand at q_start, q_start + 1, … among the keys.

    documents  int32 [B, q_start + N] or None: document of every key token
    positions  int64 [B|1, N] or None: counted from the document's start
    """
    return SequenceContext.plain(
        tokens_BN.shape[1], documents, positions, q_start=q_start, seed=seed, device=tokens_BN.device
    )


class Transformer(nn.Module):
    """Tokens → hidden states, and the losses over them.

    build_core makes the attention of one S layer from its AttentionShape. causal=False reads both ways (objective=mlm).
    context is the length of a training sample in tokens, to which a density target refers; None = each length alone.
    Raises ValueError for learned positions without a context: they are as many as it has tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        build_core: Callable[[AttentionShape], AttentionCore],
        *,
        vocab_size: int,
        causal: bool = True,
        context: int | None = None,
    ):
        super().__init__()
        self.config, self.vocab_size, self.causal = config, vocab_size, causal
        embed_dim, heads, kv_heads, head_dim, mlp_dim = config.widths
        self.rotary = RotaryEmbedding(config.rope, head_dim)
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            if context is None:
                raise ValueError("model.positions is learned and no context is given; give the number of positions")
            self.embed_positions = nn.Embedding(context, embed_dim)
            nn.init.normal_(self.embed_positions.weight, std=INIT_STD)
        self.layers = nn.ModuleList()
        for index, letter in enumerate(config.layers):
            shape = AttentionShape(heads, kv_heads, head_dim, embed_dim, layer=index, causal=causal, context=context)
            core = build_core(shape) if letter == "S" else common_core(letter, shape, config.local_window)
            self.layers.append(
                Layer(
                    core,
                    depth=config.depth,
                    mlp=config.mlp,
                    mlp_dim=mlp_dim,
                    dropout=config.dropout,
                    qk_norm=config.qk_norm,
                    qkv_bias=config.qkv_bias,
                    eps=config.norm_eps,
                    activation_checkpointing=bool(config.activation_checkpointing),
                    chunk=config.chunk,
                )
            )
        self.norm = RMSNorm(embed_dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else matrix(embed_dim, vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, E]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens_BN: Tensor, ctx: SequenceContext, caches: list[KVCache] | None = None) -> ModelOutput:
        """Hidden states of int64 tokens [B, N]; with caches (one per layer), N new tokens after ctx.q_start old ones.

        Raises ValueError where caches do not hold ctx.q_start tokens, more positions are read than were learned, or
        what is kept for the backward pass should leave a device that has no other memory (offload on a CPU).
        """
        if caches is not None and any(cache.length != ctx.q_start for cache in caches):
            raise ValueError(
                f"ctx.q_start is {ctx.q_start} but the caches hold {[cache.length for cache in caches]} tokens; "
                "q_start counts the tokens already read"
            )
        if caches is not None:
            ctx = replace(ctx, states={index: cache.state for index, cache in enumerate(caches)})
        x_BNE = self.embed_tokens(tokens_BN)
        rotation = None
        if self.embed_positions is None:
            rotation = self.rotary(ctx.positions)
            ctx = replace(ctx, rotary=self.rotary.rotated)
        else:
            x_BNE = x_BNE + self._learned(ctx)
        if self.training and self.config.dropout:
            x_BNE = dropped(x_BNE, self.config.dropout, 0, ctx)
        aux_losses: list[Tensor] = []
        stats: dict[str, list[Tensor]] = {}
        choices: list[Tensor] = []
        kept = None
        if self.config.activation_checkpointing == "offload" and caches is None and torch.is_grad_enabled():
            kept = KeptInputs(copies_of(x_BNE.device))
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            keep = None if kept is None else partial(kept.keep, stays=index == len(self.layers) - 1)
            x_BNE, aux_loss, layer_stats, choice = layer(x_BNE, rotation, ctx, cache, keep)
            if choice is not None:
                choices.append(choice)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
            for name, value in layer_stats.items():
                stats.setdefault(name, []).append(value.detach())
            if "density" in layer_stats and self.config.layers[index] == "S":
                stats.setdefault("chosen_density", []).append(layer_stats["density"].detach())
        return ModelOutput(
            hidden=self.norm(x_BNE),
            aux_loss=torch.stack(aux_losses).sum() if aux_losses else None,
            stats={name: torch.stack(values).mean(0) for name, values in stats.items()},
            choices=choices,
        )

    def _learned(self, ctx: SequenceContext) -> Tensor:
        """The vectors of the positions, [B|1, N, E]."""
        assert self.embed_positions is not None
        known = self.embed_positions.num_embeddings
        length = ctx.q_start + ctx.positions.shape[1] if ctx.shard is None else ctx.shard.length
        if length > known and (ctx.documents is None or int(ctx.positions.max()) >= known):
            raise ValueError(
                f"the text has {length} tokens, and this model has learned {known} positions; train with "
                f"data.context={length}, or with model.positions=rope"
            )
        return self.embed_positions(ctx.positions)

    @property
    def cores(self) -> list[AttentionCore]:
        """The attention of each layer, the first layer first."""
        return [part.core for layer in self.layers for part in layer.children() if isinstance(part, SelfAttention)]

    def selector_parameters(self) -> list[nn.Parameter]:
        """Of all layers: AttentionCore.selector_parameters."""
        return [parameter for core in self.cores for parameter in core.selector_parameters()]

    def caches(self, until: int | None = None, documents: Tensor | None = None) -> list[KVCache]:
        """Empty caches for decoding, one per layer.

        until      tokens of a sequence, those to come included; keys that none of them reads any more are forgotten.
                   None = unknown: every key is kept
        documents  int32 [B, until] or None: document of every token, those to come included
        """
        return [KVCache(None if until is None else core.key_expiry(until, documents)) for core in self.cores]

    def set_step(self, step: int, max_steps: int) -> None:
        """To be called before the optimizer step after `step` finished ones: schedules inside the attention follow."""
        for core in self.cores:
            core.set_step(step, max_steps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, N, E] → [B, N, V]. All at once: for a few tokens, not for a long sequence."""
        return nn.functional.linear(hidden, self.head_weight)

    def loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of −log p(label) in nats over labels [B, N] ≠ −100: fp32 scalar."""
        return cross_entropy_sum(hidden.flatten(0, 1), self.head_weight, labels.flatten(), self._loss_chunk)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """−log p(label) of every token in nats, 0 where the label is −100: fp32 [B, N], without gradient."""
        losses_T = token_cross_entropy(hidden.flatten(0, 1), self.head_weight, labels.flatten(), self._loss_chunk)
        return losses_T.view_as(labels)

    @property
    def _loss_chunk(self) -> int:
        """Tokens whose logits take no more room than an MLP chunk."""
        return min(self.config.chunk, max(1, self.config.chunk * self.config.widths.mlp_dim // self.vocab_size))

    def flops_per_token(self, context: int, density: float) -> tuple[float, float]:
        """Training FLOPs per token at `context` tokens: (at this density, with dense attention in every layer).

        6 per parameter of every matrix product (the embedding lookup is none), and 12 · heads · head_dim per key read
        (PaLM, arXiv 2204.02311, appendix B; a causal token reads half the context). `density` is the mean over layers,
        as in ModelOutput.stats. Recomputed work is not counted.
        """
        widths = self.config.widths
        matrices = sum(p.numel() for p in self.layers.parameters() if p.dim() >= 2) + self.head_weight.numel()
        keys = (context + 1) / 2 if self.causal else float(context)
        attention = 12 * widths.heads * widths.head_dim * keys * self.config.depth
        return 6 * matrices + density * attention, 6 * matrices + attention
