"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Llama's half-rotation convention.

The head is split in two halves, not in even and odd entries, and the scaled frequencies are those of transformers'
ROPE_INIT_FUNCTIONS, so that imported weights give the same logits.

Shapes: B batch, N tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation, and how they stretch to contexts longer than those trained on.

    linear  every frequency is divided by `factor` (Chen et al. 2023, arXiv 2306.15595)
    ntk     base · factor^(D / (D − 2)), constant over the run. transformers' "dynamic" with its own factor f, at length
            L over a trained length P, is factor = f · L / P − (f − 1) here: constant, so that a cached key stays valid
    yarn    low frequencies divided by `factor`, high ones kept, a ramp between (Peng et al. 2023, arXiv 2309.00071)
    llama3  the same with a ramp in turns per original_context, and cos and sin unscaled (Llama 3.1's, arXiv 2407.21783)
    """

    base: float = 10_000.0
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    factor: float = 1.0  # how many times longer the context becomes
    original_context: int | None = None  # yarn, llama3: tokens of context the weights were trained at
    beta_fast: float = 32.0  # yarn: frequencies turning more often than this within original_context are kept
    beta_slow: float = 1.0  # yarn: frequencies turning less often than this are divided by factor
    attention_factor: float | None = None  # yarn: scale of cos and sin; null: 0.1 · ln(factor) + 1
    low_freq_factor: float = 1.0  # llama3: frequencies turning less often than this are divided by factor
    high_freq_factor: float = 4.0  # llama3: frequencies turning more often than this within original_context are kept

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "ntk", "yarn", "llama3"):
            raise ValueError(f"model.rope.scaling is {self.scaling!r}; use none, linear, ntk, yarn or llama3")
        if not self.base > 1.0:
            raise ValueError(f"model.rope.base is {self.base}; it must exceed 1 (Llama uses 10000)")
        if not self.factor >= 1.0:
            raise ValueError(f"model.rope.factor is {self.factor}; it stretches the context and must be at least 1")
        if self.scaling == "none" and self.factor != 1.0:
            raise ValueError(
                f"model.rope.factor is {self.factor} but model.rope.scaling is none; choose linear, ntk, yarn or llama3"
            )
        for name, readers in _READERS.items():
            value = getattr(self, name)
            if self.scaling not in readers and value != RopeConfig.__dataclass_fields__[name].default:
                raise ValueError(
                    f"model.rope.{name} is {value}, which is for {' and '.join(readers)}, but model.rope.scaling is "
                    f"{self.scaling}; remove it or use model.rope.scaling={readers[0]}"
                )
        if self.scaling in ("yarn", "llama3") and (self.original_context is None or self.original_context < 1):
            raise ValueError(
                f"model.rope.original_context is {self.original_context}; {self.scaling} needs the tokens of context "
                "the weights were trained at"
            )
        if self.scaling == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"model.rope.beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; "
                "yarn needs beta_fast > beta_slow > 0"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"model.rope.attention_factor is {self.attention_factor}; it must be above 0, or null")
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"model.rope.high_freq_factor is {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}; "
                "llama3 needs high_freq_factor > low_freq_factor > 0"
            )

    def frequencies(self, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
        """Radians per token, fp32 [D/2], and the scale of cos and sin."""
        exponent_D = torch.arange(0, head_dim, 2, device=device).float() / head_dim
        if self.scaling == "ntk":
            return 1.0 / (self.base * self.factor ** (head_dim / (head_dim - 2))) ** exponent_D, 1.0
        kept_D = 1.0 / self.base**exponent_D
        if self.scaling in ("none", "linear"):
            return kept_D / self.factor, 1.0

        assert self.original_context is not None  # __post_init__
        if self.scaling == "llama3":
            turns_D = self.original_context / (2 * math.pi / kept_D)
            ramp_D = (turns_D - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            ramp_D = ramp_D.clamp(0, 1)
            return (1 - ramp_D) * kept_D / self.factor + ramp_D * kept_D, 1.0
        low = max(math.floor(self._turning(self.beta_fast, head_dim)), 0)
        high = min(math.ceil(self._turning(self.beta_slow, head_dim)), head_dim - 1)
        width = high - low if high != low else 0.001
        ramp_D = ((torch.arange(head_dim // 2, device=device).float() - low) / width).clamp(0, 1)
        scale = self.attention_factor or 0.1 * math.log(self.factor) + 1.0
        return kept_D / self.factor * ramp_D + kept_D * (1 - ramp_D), scale

    def _turning(self, turns: float, head_dim: int) -> float:
        """The index in [0, D/2) whose frequency makes `turns` turns within original_context."""
        assert self.original_context is not None
        return head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.base))


_READERS = {  # the scalings that read a field; elsewhere it must keep its default
    "original_context": ("yarn", "llama3"),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn",),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
}


class Rotation(NamedTuple):
    """cos and signed sin of every token's angles, fp32 [B|1, N, 1, D]: built once per pass, read by all layers."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_BNHD: Tensor) -> Tensor:
        """x rotated by its tokens' positions: computed in fp32, returned in x's dtype."""
        # rotate_half(x) · sin is roll(x) · (−sin, sin): two passes over memory in place of five.
        rolled_BNHD = x_BNHD.roll(x_BNHD.shape[-1] // 2, -1)
        return torch.addcmul(x_BNHD * self.cos, rolled_BNHD, self.sin).to(x_BNHD.dtype)


class RotaryEmbedding:
    """Positions → Rotation. No buffers: a model cast to bf16 must not round its frequencies."""

    def __init__(self, config: RopeConfig, head_dim: int):
        self.config, self.head_dim = config, head_dim

    @torch.no_grad()
    def __call__(self, positions_BN: Tensor) -> Rotation:
        """The rotation of tokens at int64 positions [B|1, N]."""
        frequency_D, scale = self.config.frequencies(self.head_dim, positions_BN.device)
        angle_BN1D = (positions_BN[..., None].float() * frequency_D)[:, :, None]
        cos, sin = angle_BN1D.cos() * scale, angle_BN1D.sin() * scale
        return Rotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def rotated(self, x_BHNW: Tensor, positions_BN: Tensor) -> Tensor:
        """Vectors of any even width W, turned as the model turns heads of that width: SequenceContext.rotary."""
        rotation = RotaryEmbedding(self.config, x_BHNW.shape[-1])(positions_BN)
        return rotation.apply(x_BHNW.transpose(1, 2)).transpose(1, 2)
