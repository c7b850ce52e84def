"""What every attention variant is: a module from queries, keys and values to an output in the shape of the queries.

A variant is one file here and one YAML in conf/attention/ whose `_target_` names its AttentionCore subclass.
The subclass's `Config` (a frozen dataclass on top of the file) is the schema of the YAML; its capabilities are class
attributes, checked once at construction, so that nothing fails in the middle of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from lightsparse.context_parallel.shard import ContextShard
from lightsparse.kernels import Dropout, sample_keys
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.mask import document_starts


@dataclass(frozen=True)
class AttentionShape:
    """What the model tells a core about its layer."""

    heads: int  # query heads
    kv_heads: int  # key/value heads; divides heads
    head_dim: int
    embed_dim: int
    layer: int = 0  # index in the depth of the model
    causal: bool = True
    context: int | None = None  # tokens of a training sample: the length a density target refers to; None = each length

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads")


class Rotary(Protocol):
    """Turns vectors of a core's own by their positions, as the model turns q and k."""

    def __call__(self, x: Tensor, positions: Tensor, /) -> Tensor:
        """x [B, H, n, W], W even, at int64 positions [B|1, n] counted from the document's start → the same, turned."""


@dataclass
class SequenceContext:
    """Where the tokens of one forward pass stand. One object serves all layers of that pass.

    positions  int64 [B|1, Nq]: position of each query token from its document's start (RoPE's angle)
    documents  int32 [B, Nkv] or None: document id of every key token, non-decreasing; None = one document
    q_start    index of the first query among the keys: Nq = Nkv − q_start (decoding with a cache)
    seed       one integer of (run seed, global step): with sample ids, all randomness of the pass is a function of it
    sample_ids int64 [B] or None: global ids of the samples, so that randomness does not depend on the batch's split
    states     per layer, what a core keeps between decoding steps beside keys and values; None = no decoding
    cached_block_ids  int64 [n] or None: ids, ascending, of the key blocks that k and v consist of where the layer's
               cache has dropped others (AttentionCore.key_expiry); all are whole but the last. None = all keys
    layouts    what the cores built for this pass, keyed by their own config: built once, read by every layer
    shard      this rank's part of a sequence that several ranks hold: q, k, v, x and positions are those of its tokens
               then, `documents` still those of the whole sequence, [B, shard.length]; None = all of it is here
    rotary     turns keys and queries of a core's own (indexers, compressors); None = the model rotates nothing
    Raises ValueError for decoding with a shard.
    """

    positions: Tensor
    documents: Tensor | None = None
    q_start: int = 0
    seed: int = 0
    sample_ids: Tensor | None = None
    states: dict[int, dict[str, Tensor]] | None = None
    cached_block_ids: Tensor | None = None
    layouts: dict[Any, Any] = field(default_factory=dict)
    shard: ContextShard | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        if self.shard is not None and (self.q_start or self.states is not None):
            raise ValueError("a sequence over several ranks cannot be decoded; generate on one rank, strategy=single")

    @classmethod
    def plain(
        cls,
        num_queries: int,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        q_start: int = 0,
        seed: int = 0,
        rotary: Rotary | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """The context of queries at q_start, q_start + 1, … among the keys, with the whole sequence on this rank.

        positions  None = counted from the start of each document
        Raises ValueError for documents of another length, and ids that decrease along the sequence.
        """
        stop = q_start + num_queries
        if documents is not None and documents.shape[1:] != (stop,):
            raise ValueError(
                f"documents is {tuple(documents.shape)}; it must be [B, {stop}], an id for every key token"
            )
        starts = 0 if documents is None else document_starts(documents)[:, q_start:]
        if positions is None:
            positions = torch.arange(q_start, stop, device=device)[None] - starts
        return cls(positions, documents, q_start, seed, rotary=rotary)


class KeyExpiry(NamedTuple):
    """How long a cache must keep the keys of a sequence."""

    until: int  # tokens of the sequence, those to come included
    block: int  # tokens per block, of queries and keys
    last_row: list[int]  # of each key block, the last query block that reads it; −1 = none does


@dataclass
class AttentionResult:
    out: Tensor  # [B, H, Nq, D]
    aux_loss: Tensor | None = None  # scalar, added to the loss by the training module
    # For the log, without gradient: `density` (except while decoding), and what the core names in `logged` and
    # `logged_per_head`.
    stats: dict[str, Tensor] = field(default_factory=dict)
    choice: Tensor | None = None  # the table of a selection made from the input (BlockLayout.kv_indices)


@dataclass(frozen=True)
class AttentionConfig:
    """Fields every variant has; each variant's Config extends it."""

    density: float | None = None  # target share of dense tiles; null: as the pattern gives
    dropout: float = 0.0  # share of attention weights dropped in training

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"attention.dropout is {self.dropout}; it is a share and must lie in [0, 1)")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(
                f"attention.density is {self.density}; it is a share of dense tiles and must lie in (0, 1]"
            )

    def small(self) -> Self:
        """The variant scaled down to a hundred tokens, for the tests that every variant passes."""
        raise NotImplementedError(
            f"{type(self).__name__} has no small(), which the battery tests; return the config scaled down to a "
            "hundred tokens, such as replace(self, block=16, window=20)"
        )

    def full(self) -> Self:
        """A budget of everything, under which a core with `exact_at_full_budget` equals dense attention."""
        raise NotImplementedError(
            f"{type(self).__name__} has no full(), which the battery compares with dense attention; return the config "
            "that reads everything, such as replace(self, window=1 << 24), or set the core's exact_at_full_budget=False"
        )


class AttentionCore(nn.Module):
    """Base of all variants. Subclasses set `Config` and the capabilities, and implement `attend`.

    Called like any module, on whole sequences, it returns the output. Called with a SequenceContext, as the layers of
    the transformer call it, it returns an AttentionResult:

        out = core(q, k, v, documents=documents)
        result = core(q, k, v, x=x, ctx=ctx)

    Construction raises ValueError, naming the alternative, when the shape asks for what the variant cannot do.
    """

    Config: ClassVar[type[AttentionConfig]]
    supports_causal: ClassVar[bool] = True
    supports_bidirectional: ClassVar[bool] = True
    supports_gqa: ClassVar[bool] = True
    exact_at_full_budget: ClassVar[bool] = True  # with budget = everything it equals dense attention
    # Whether `attend` reads x. If not, x may be left out, and with model.activation_checkpointing it comes without its
    # norm. Not inherited by a class with an `attend` of its own, which has to state it again.
    needs_hidden_states: ClassVar[bool] = True
    selects_from_input: ClassVar[bool] = False  # what is read depends on the input; then `choice` holds the table
    logged: ClassVar[tuple[str, ...]] = ()  # its scalars in `stats` beside density: columns of metrics.csv
    logged_per_head: ClassVar[tuple[str, ...]] = ()  # the same with one value per key/value head (or one for all)
    context_parallel: tuple[str, ...] = ()  # exchanges it can use when several ranks hold a sequence

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "attend" in vars(cls) and "needs_hidden_states" not in vars(cls):
            cls.needs_hidden_states = True

    def __init__(self, config: AttentionConfig, shape: AttentionShape):
        super().__init__()
        self.config, self.shape = config, shape
        name = type(self).__name__
        if shape.causal and not self.supports_causal:
            raise ValueError(f"{name} is bidirectional only; use objective=mlm (causal=False) or another attention")
        if not shape.causal and not self.supports_bidirectional:
            raise ValueError(f"{name} is causal only; use objective=causal (causal=True) or another attention")
        if shape.heads != shape.kv_heads and not self.supports_gqa:
            raise ValueError(f"{name} needs as many key/value heads as query heads; set model.kv_heads={shape.heads}")

    def split_granularity(self) -> int:
        """Tokens that ranks must not cut when they split a sequence: they get whole multiples of it."""
        raise NotImplementedError(f"{type(self).__name__} has no split_granularity()")

    def row_costs(self, length: int, unit: int) -> list[float]:
        """What the queries of each unit of `unit` tokens cost, in any measure: for an even split over ranks."""
        return [1.0] * -(-length // unit)

    def selector_parameters(self) -> list[nn.Parameter]:
        """Parameters that only choose what is read (an indexer, a gate, a router) and can be trained alone.

        By default all of a core that selects from its input, none of any other; a core that has both overrides this.
        """
        return list(self.parameters()) if self.selects_from_input else []

    def set_step(self, step: int, max_steps: int) -> None:
        """Called before the forward of the optimizer step after `step` finished ones: for schedules over a run."""

    def key_expiry(self, until: int, documents: Tensor | None = None) -> KeyExpiry | None:
        """How long each key of a causal sequence is read while its first `until` tokens are decoded; None = to the end.

        documents  int32 [B, until] or None
        A core that answers this must accept k and v without the keys that are no longer read: `ctx.cached_block_ids`.
        """
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        x: Tensor | None = None,
        ctx: SequenceContext | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor | AttentionResult:
        """Attention of whole sequences: q [B, H, N, D], k/v [B, Hkv, N, D] after RoPE → out [B, H, N, D].

        x          [B, N, E], the input of the layer; required by variants that read it, others ignore it
        documents  int [B, N], non-decreasing: the packed document that each token belongs to; None = one document
        positions  int64 [B|1, N], counted from the document's start; None = 0, 1, 2, … Only `rotary` uses them
        rotary     the RoPE that q and k went through, for variants that rotate keys of their own: the method `rotated`
                   of a lightsparse.models.rope.RotaryEmbedding; None = no rotation
        ctx        replaces these three and makes the call return the AttentionResult: auxiliary loss, statistics.
                   `context` makes one for whole sequences; decoding and sequences split over ranks need one

        Without ctx, training includes the variant's own loss (aux_loss): the backward pass of `out` adds its gradient,
        as if it had been added to the loss. Dropout and routing noise then follow torch.manual_seed. A schedule over a
        run (dense_steps, tau_start …) stays at the first step unless `set_step` moves it.
        Raises ValueError for shapes that do not fit, and for a missing x.
        """
        if x is None and self.needs_hidden_states:
            raise ValueError(
                f"{type(self).__name__} reads the input of its layer; give x=, of shape [B, N, {self.shape.embed_dim}]"
            )
        if ctx is None:
            self._check(q, k, v, x)
        elif any(given is not None for given in (documents, positions, rotary)):
            raise ValueError("ctx is given, which has documents, positions and rotary; leave them out")
        hidden = q.new_empty(len(q), q.shape[2], 0) if x is None else x
        result = self.attend(q, k, v, x=hidden, ctx=ctx or self.context(q, documents, positions, rotary))
        if ctx is not None:
            return result
        if result.aux_loss is None or not self.training:
            return result.out
        return _JoinedByLoss.apply(result.out, result.aux_loss)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> None:
        of = self.shape
        for name, given, heads in (("q", q, of.heads), ("k", k, of.kv_heads), ("v", v, of.kv_heads)):
            if given.shape != (*q.shape[:1], heads, *q.shape[2:3], of.head_dim):
                raise ValueError(
                    f"{name} is {tuple(given.shape)}; it must be [B, {heads}, N, {of.head_dim}], with the same B and N "
                    "for q, k and v"
                )
        if x is not None and self.needs_hidden_states and x.shape != (len(q), q.shape[2], of.embed_dim):
            raise ValueError(
                f"x is {tuple(x.shape)}; it must be [B, N, embed_dim], {(len(q), q.shape[2], of.embed_dim)}"
            )

    def context(
        self,
        q: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> SequenceContext:
        """The context of whole sequences with queries q [B, H, N, D], as a call without ctx uses it; see forward."""
        seed = int(torch.randint(1 << 62, ())) if self.training else 0
        return SequenceContext.plain(q.shape[2], documents, positions, seed=seed, rotary=rotary, device=q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        """q [B, H, Nq, D], k/v [B, Hkv, Nkv, D] after RoPE, x [B, Nq, E] the layer's input → AttentionResult.

        Implemented by subclasses. Call the module instead, so that hooks run.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attend()")

    def dropout(self, q: Tensor, ctx: SequenceContext, apart: int = 0) -> Dropout | None:
        """Dropout of the attention weights in this pass, or None if it is off.

        apart  added to the layer's number, for an independent draw
        """
        if self.config.dropout == 0.0 or not self.training:
            return None
        samples = torch.arange(len(q), device=q.device) if ctx.sample_ids is None else ctx.sample_ids
        return Dropout(self.config.dropout, sample_keys(ctx.seed, self.shape.layer + apart, samples))

    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        """The BlockLayout of this pass, for kernels, pictures and density; fixed patterns only."""
        raise NotImplementedError(f"{type(self).__name__} has no layout that is known before its input")


class _JoinedByLoss(torch.autograd.Function):
    """out, whose backward pass also runs that of a scalar loss with gradient 1, as in DeepSeek's models."""

    @staticmethod
    def forward(ctx, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, *ctx.saved_tensors
