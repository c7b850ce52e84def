"""How the next token is drawn from the logits: temperature, then the k likeliest, then the nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # draw among the k likeliest tokens; None = all
    # Draw among the fewest likeliest tokens that hold this share of the probability (Holtzman et al. 2020,
    # arXiv 1904.09751, section 3.1), after top_k; None = all.
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or null for all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it is a share and must lie in (0, 1], or null for all tokens")


GREEDY = Sampling(temperature=0.0)


def sample(logits_BV: Tensor, how: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token per row, int64 [B]."""
    if how.temperature == 0.0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / how.temperature
    if how.top_k is None and how.top_p is None:
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
    vocabulary = logits_BV.shape[1]
    top = logits_BV.topk(min(how.top_k or vocabulary, vocabulary))
    share_BK = top.values.softmax(-1)
    if how.top_p is not None:  # what the likelier ones hold together; the likeliest always stays
        share_BK = share_BK.masked_fill(share_BK.cumsum(-1) - share_BK >= how.top_p, 0.0)
    chosen_B1 = torch.multinomial(share_BK, 1, generator=generator)
    return top.indices.gather(1, chosen_B1)[:, 0]
