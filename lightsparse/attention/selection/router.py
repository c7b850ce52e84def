"""A block router: scores between block summaries, gates, and a choice under a budget with exact ties.

Shapes: B batch, H heads that choose on their own, E width of a summary, F router dim, R rows (query blocks),
C columns (key blocks), K entries of a row's table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.pooling.block_means import Summaries
from lightsparse.utils.hashing import chain, mixed, uniform

_NOISE = 0x6A7E  # keeps the gates' noise apart from every other use of the pass's seed
_INIT_GAIN = 0.5  # of scores between unrelated summaries: small, so that the first gates are close to the offset's


class Choice(NamedTuple):
    """What some rows chose. Only `bias` and `gates` have a gradient."""

    table: Tensor  # int32 [B, H, R, K]: chosen blocks and the own one, ascending, −1 padded
    bias: Tensor  # [B, H, R, K]: log of the gate, 0 for the own block and the padding
    gates: Tensor  # [B]: sum of the gates, without noise, over the pairs that could be chosen
    pairs: Tensor  # [B]: how many those are, heads included
    entropy: Tensor  # scalar: sum of the gates' entropies in nats
    capped: Tensor  # scalar: rows, heads and samples counted, that chose k_max blocks


@dataclass(frozen=True, eq=False)
class Noise:
    """What training's noise is a function of, beside head, row and column."""

    seed: int  # of the pass
    layer: int
    samples: Tensor  # int64 [B]: global sample ids


class BlockRouter(nn.Module):
    """s[I, J] = ⟨W_q q̄_I, W_k k̄_J⟩ / √F + b, per head, over summaries scaled to a root mean square of 1.

    Both matrices start equal, so that s starts as a random projection of q̄ · k̄, the affinity of MoBA (Lu et al. 2025,
    arXiv 2502.13189, section 2.2). The temperature of a head is the schedule's times exp(theta).

    heads, width, dim  H, E, F
    share              σ(b), about the mean gate at temperature 1 at the start; in (0, 1)
    """

    def __init__(self, heads: int, width: int, dim: int, share: float):
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, width, dim) * math.sqrt(_INIT_GAIN / width))
        self.key = nn.Parameter(self.query.detach().clone())
        self.offset = nn.Parameter(torch.full((heads,), math.log(share / (1 - share))))
        self.theta = nn.Parameter(torch.zeros(heads))

    def projected(self, means: Summaries) -> Summaries:
        """The same with features [B, H, R|C, F] in place of means; the product of two is their score, without b."""
        late = means.query_late is not None and means.key_late is not None
        return Summaries(
            self._features(means.query, self.query),
            self._features(means.key, self.key),
            self._features(means.query_late, self.query) if late else None,
            self._features(means.key_late, self.key) if late else None,
            means.first,
            means.last,
            means.first_row,
        )

    def _features(self, means_BHRD: Tensor | None, weight_HEF: Tensor) -> Tensor:
        assert means_BHRD is not None
        if len(weight_HEF) < means_BHRD.shape[1]:  # one choice for all heads: their summaries side by side
            means_BHRD = means_BHRD.transpose(1, 2).flatten(2)[:, None]
        unit = F.rms_norm(means_BHRD, means_BHRD.shape[-1:], eps=1e-6)
        return unit @ weight_HEF.to(unit.dtype) * weight_HEF.shape[-1] ** -0.25

    def temperature(self, schedule: Tensor, dtype: torch.dtype) -> Tensor:
        """τ of each head, [H]; schedule: scalar."""
        return schedule.to(dtype, copy=True) * self.theta.to(dtype).exp()

    def choose(
        self,
        of: Summaries,
        tau_H: Tensor,
        rows: range,
        *,
        causal: bool,
        k_max: int,
        threshold: float,
        noise: Noise | None,
    ) -> Choice:
        """The choice of some rows, counted from of.first_row; `of` is projected. All scores of these rows at once.

        Chosen are the own block and the highest gates ≥ threshold, at most k_max; in a row whose two ends stand in
        different documents, at most k_max for each of them, because they may not share a budget.
        """
        device, width = of.query.device, of.key.shape[2]
        row_R = torch.arange(of.first_row + rows.start, of.first_row + rows.stop, device=device)
        column_C = torch.arange(of.first_row + rows.stop if causal else width, device=device)
        logits = self._logits(of, tau_H, rows, row_R, column_C)
        earlier, later = candidates(of, row_R, column_C, causal)
        pairs = earlier | later
        noisy = logits
        if noise is not None:
            noisy = logits + logistic_noise(noise, logits.shape[1], row_R, column_C).to(logits.dtype)

        with torch.no_grad():
            open_ = noisy >= (math.log(threshold / (1 - threshold)) if threshold else -math.inf)
            chosen, entries = best(noisy, pairs & open_, k_max), k_max + 1
            if not causal and of.first is not None and of.last is not None:
                apart = (of.first != of.last)[:, None, row_R, None]
                each = best(noisy, earlier & open_, k_max) | best(noisy, later & open_, k_max)
                chosen, entries = torch.where(apart, each, chosen), 2 * k_max + 1
            table = listed(chosen | (column_C == row_R[:, None]), min(entries, width))
            capped = (chosen.sum(-1) >= k_max).sum()
            entropy = (gate_entropy(logits) * pairs).sum()

        log_gate = F.logsigmoid(noisy).gather(3, table.clamp(min=0).long())
        bias = log_gate.masked_fill((table < 0) | (table == row_R[:, None]), 0.0)
        gates_B = (torch.sigmoid(logits) * pairs).sum((1, 2, 3))
        pairs_B = pairs.sum((1, 2, 3)).expand(len(logits)) * logits.shape[1]
        return Choice(table, bias, gates_B, pairs_B, entropy, capped)

    def _logits(self, of: Summaries, tau_H: Tensor, rows: range, row_R: Tensor, column_C: Tensor) -> Tensor:
        """s / τ, [B, H, R, C]."""

        def scores(query: Tensor, key: Tensor) -> Tensor:
            return query[:, :, rows.start : rows.stop] @ key[:, :, : len(column_C)].transpose(-1, -2)

        s = scores(of.query, of.key)
        if of.query_late is not None and of.key_late is not None:
            s = torch.where(column_C < row_R[:, None], s, scores(of.query_late, of.key_late))
        return (s + self.offset.to(s.dtype)[:, None, None]) / tau_H[:, None, None]


def candidates(of: Summaries, row_R: Tensor, column_C: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Blocks before the row with tokens of its first document, and after it of its last one: bool [B|1, 1, R, C]."""
    earlier = (column_C < row_R[:, None])[None, None]
    later = (column_C > row_R[:, None])[None, None] & (not causal)
    if of.first is not None and of.last is not None:
        first, last = of.first[:, None, None], of.last[:, None, None]  # [B, 1, 1, blocks]
        earlier = earlier & (last[..., column_C] == first[..., row_R].transpose(-1, -2))
        later = later & (first[..., column_C] == last[..., row_R].transpose(-1, -2))
    return earlier, later


def logistic_noise(noise: Noise, heads: int, row_R: Tensor, column_C: Tensor) -> Tensor:
    """Standard logistic noise, the law of the difference of two Gumbels: fp32 [B, H, R, C].

    A gate of two outcomes needs only that difference (Maddison et al. 2017, arXiv 1611.00712, appendix B).
    """
    head_H = torch.arange(heads, device=row_R.device)
    key = mixed(noise.seed, noise.layer, _NOISE)
    bits = chain(key, noise.samples[:, None, None, None], head_H[:, None, None], row_R[:, None], column_C)
    return torch.logit(uniform(bits).clamp(min=2.0**-25))  # uniform() is below 1 but may be 0: no noise is infinite


def best(scores: Tensor, among: Tensor, most: int) -> Tensor:
    """The candidates `among` each row, or the `most` highest of them; equal scores go to the lower index. [.., R, C]"""
    if most >= scores.shape[-1]:
        return among.expand(scores.shape)
    ranked = scores.masked_fill(~among, -math.inf)
    lowest = ranked.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = ranked > lowest
    equal = among & (ranked == lowest)
    room = most - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def listed(chosen: Tensor, width: int) -> Tensor:
    """Bool [.., R, C] → indices of the True entries, int32 [.., R, width], ascending, −1 padded."""
    columns = chosen.shape[-1]
    ids = torch.where(chosen, torch.arange(columns, device=chosen.device), columns)
    ids = ids.topk(min(width, columns), dim=-1, largest=False, sorted=True).values
    ids = F.pad(ids, (0, width - ids.shape[-1]), value=columns)
    return ids.masked_fill(ids == columns, -1).to(torch.int32)


def gate_entropy(logits: Tensor) -> Tensor:
    """Entropy of a gate σ(logits) in nats, at most ln 2."""
    gate = torch.sigmoid(logits)
    return -gate * F.logsigmoid(logits) - (1 - gate) * F.logsigmoid(-logits)


def index_churn(before: Tensor, after: Tensor) -> Tensor:
    """Of the entries of two tables [B, H, NQ, K] (`BlockLayout.kv_indices`), the share that only one has: scalar.

    0: the same blocks everywhere; 1: no block in common. The tables may differ in K.
    """
    common = ((before[..., :, None] == after[..., None, :]) & (before >= 0)[..., None]).sum()
    union = (before >= 0).sum() + (after >= 0).sum() - common
    return 1 - common / union
