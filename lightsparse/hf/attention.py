"""One variant as the attention function of transformers: heads and masks in its convention, ours inside."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightsparse.attention.core import AttentionCore, AttentionShape
from lightsparse.config.build import AttentionChoice
from lightsparse.hf.key_mask import Part, parts_of
from lightsparse.models.layer_pattern import common_core
from lightsparse.utils.compat.transformers import WITHOUT_EFFECT, layer_of, reads_the_past_alone


@dataclass(frozen=True, eq=False)
class Variant:
    """An attention that needs no parameters of its own.

    context       tokens that a density refers to; None = each length alone
    layers        repeated over the depth: S the chosen attention, D dense, L local, such as SSSD
    local_window  tokens that an L layer reads
    """

    name: str
    choice: AttentionChoice
    context: int | None = None
    layers: str = "S"
    local_window: int | None = None
    _cores: dict[tuple[str, AttentionShape, float], AttentionCore] = field(default_factory=dict, init=False)

    @torch.compiler.disable  # tables from values: a compiled model breaks here
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_ids: Tensor | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """query [B, H, Nq, D], key/value [B, Hkv, Nkv, D] → [B, Nq, H, D], and None for the weights.

        attention_mask  from `key_mask`, or None: causal
        dropout         share of weights dropped, config.attention_dropout in training
        others          sliding_window, softcap …: refused unless null or false, so that nothing asked for is lost
        """
        self._check(module, query, value, is_causal, others)
        if torch.is_autocast_enabled(query.device.type):  # RoPE leaves queries and keys in fp32, as sdpa expects
            query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
        (_, heads, _, head_dim), kv_heads = query.shape, key.shape[1]
        core = self.core(
            AttentionShape(heads, kv_heads, head_dim, heads * head_dim, layer=layer_of(module), context=self.context),
            dropout,
        )
        if scaling is not None and not math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6):
            query = query * (scaling * head_dim**0.5)
        seed = int(torch.randint(1 << 62, ())) if dropout else 0  # torch's generator: a recompute draws it again
        parts = parts_of(attention_mask, query.shape[2], key.shape[2], position_ids, query.device)
        if len(parts) == 1 and parts[0].samples is None and not parts[0].skipped:
            return self._attend(core, query, key, value, parts[0], seed).transpose(1, 2).contiguous(), None
        out = torch.zeros_like(query)
        for part in parts:
            rows = torch.arange(len(query), device=query.device) if part.samples is None else part.samples
            q, k, v = (x.index_select(0, rows) for x in (query, key, value))
            found = self._attend(core, q[:, :, part.skipped :], k, v, part, seed)
            out = out.index_copy(0, rows, nn.functional.pad(found, (0, 0, part.skipped, 0)))
        return out.transpose(1, 2).contiguous(), None

    def core(self, shape: AttentionShape, dropout: float = 0.0) -> AttentionCore:
        """The attention of the layer `shape.layer`, in training mode where it drops weights."""
        letter = self.layers[shape.layer % len(self.layers)]
        key = (letter, shape, dropout)
        if key not in self._cores:
            if letter == "S":
                core = self.choice.core(replace(self.choice.config, dropout=dropout), shape)
            else:
                core = common_core(letter, shape, self.local_window, dropout)
            self._cores[key] = core.train(dropout > 0)
        return self._cores[key]

    def _check(
        self, module: nn.Module, query: Tensor, value: Tensor, is_causal: bool | None, others: dict[str, object]
    ) -> None:
        if not reads_the_past_alone(module, is_causal):
            raise ValueError(f"{self.name} is causal and {type(module).__name__} reads both ways; use sdpa there")
        if query.shape[3] != value.shape[3]:
            raise ValueError(
                f"queries have {query.shape[3]} numbers per head and values {value.shape[3]}; {self.name} needs the "
                "same for both, use sdpa"
            )
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
            if others.get(name) is not None:
                raise ValueError(
                    f"{name} is given; {self.name} reads packed documents from restarting position_ids, leave it out"
                )
        for name, given in others.items():
            if name not in WITHOUT_EFFECT and given is not None and given is not False:
                raise ValueError(f"the model gives its attention {name}, which {self.name} cannot honour; use sdpa")

    def _attend(self, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, part: Part, seed: int) -> Tensor:
        """Queries, already without those skipped, over the part's keys: [S, H, Nq, D]."""
        ctx = replace(part.ctx, seed=seed, sample_ids=part.samples)
        k, v = k[:, :, part.first : part.stop], v[:, :, part.first : part.stop]
        result = core(q, k, v, ctx=ctx)
        if result.aux_loss is not None:
            raise ValueError(f"{self.name} has a loss of its own, which a transformers model would lose")
        return result.out
