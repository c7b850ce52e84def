"""The two ways of the `routed` backend through some of its rows. The names of dimensions are those of routed_call.py.

C = the keys of a list of blocks, side by side; L = lists, X = tiles or lists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.kernels.dropout import kept
from lightsparse.kernels.routed_call import Call, Gradients, Rows
from lightsparse.kernels.routes import Routes

_SCORES = 1 << 18  # numbers in the tiles worked on at once
_GATHERED = 1 << 21  # numbers in the keys gathered at once


class Portion:
    """Some rows of a call."""

    def __init__(self, call: Call, of: Rows):
        self.call, self.of, self.rows = call, of, of.rows

    def at(self, values: Tensor, block: Tensor) -> Tensor:
        """Numbers of the keys of blocks [...] (numbered over all heads): [..., S]."""
        call = self.call
        head, column = block // call.J, block % call.J
        return values[(head // call.Hkv) % len(values), column]

    def allowed(self, row: Tensor, block: Tensor) -> Tensor:
        """Whether rows [X, M] may read the keys of blocks [X, C]: bool [X, M, C · S]."""
        keys, position = self.call.keys, self.of.position[row][..., None]
        opens, closes = (self.at(values, block).flatten(1)[:, None] for values in (keys.opens, keys.closes))
        allowed = (opens <= position) & (position < closes)
        if self.of.document is not None and keys.documents is not None:
            allowed &= self.of.document[row][..., None] == self.at(keys.documents, block).flatten(1)[:, None]
        return allowed

    def keep(self, row: Tensor, block: Tensor) -> Tensor:
        """Dropout's factors for the same pairs."""
        call = self.call
        assert call.dropout is not None and call.keys.hashes is not None and self.of.hashes is not None
        keys = self.at(call.keys.hashes, block).flatten(1)[:, None]
        return kept(call.dropout.rate, self.of.hashes[row][..., None], keys, call.dtype)


class ByBlock(Portion):
    """Tiles of rows against the one block that all of them chose."""

    def __init__(self, call: Call, of: Rows, plan: Routes):
        super().__init__(call, of)
        self.plan = plan
        self.partial = self._partial()

    def forward(self) -> tuple[Tensor, Tensor]:
        call, plan = self.call, self.plan
        slots, spare = plan.row.shape[1], plan.row.numel()
        parts = call.q_RD.new_zeros(spare + 1, call.D, dtype=call.dtype)  # the last one is for entries that are none
        lse = parts.new_full((spare + 1,), float("-inf"))
        for now in self._some_tiles():
            scores, _, v_TSD = self._scores(now)
            most = scores.amax(-1, keepdim=True)
            # A slot with no visible key would be exp(−inf + inf) = NaN; its weights are zero.
            p = torch.exp(scores.sub_(torch.where(most == float("-inf"), 0.0, most)), out=scores)
            total = p.sum(-1, keepdim=True)
            lse[now.start * slots : now.stop * slots] = (most + total.log()).flatten()
            if call.dropout is not None:
                p.mul_(self.keep(plan.row[now].clamp(min=0), plan.block[now, None]))
            part = torch.bmm(p, v_TSD, out=parts[now.start * slots : now.stop * slots].view(-1, slots, call.D))
            part.div_(total.clamp(min=torch.finfo(call.dtype).tiny))
        lse_RK = lse[plan.position]
        if call.bias_RK is not None:
            lse_RK = lse_RK + call.bias_RK[self.rows]
        lse_R = lse_RK.logsumexp(-1) if call.K else lse_RK.new_full(lse_RK.shape[:1], float("-inf"))
        weight_RK = (lse_RK - lse_R[:, None]).exp_().masked_fill_((lse_R == float("-inf"))[:, None], 0.0)
        return _weighted_sums(parts, plan.position, weight_RK).to(call.q_RD.dtype), lse_R

    def backward(self, sums: Gradients) -> None:
        call, plan = self.call, self.plan
        slots, spare = plan.row.shape[1], plan.row.numel()
        parts = call.q_RD.new_zeros(spare + 1, call.D, dtype=call.dtype)
        dbias = parts.new_zeros(spare + 1) if sums.bias_RK is not None else None
        shift = sums.lse_R[self.rows, None].to(call.dtype)
        shift = torch.where(shift == float("-inf"), float("inf"), shift)
        if call.bias_RK is not None:
            shift = shift - call.bias_RK[self.rows]
        shift_of = parts.new_full((spare + 1,), float("inf"))  # exp(−inf) = 0: nothing in an empty slot counts
        shift_of[plan.position] = shift.expand(-1, call.K)
        delta_R = sums.delta_R[self.rows]
        for now in self._some_tiles():
            row_TM, at = plan.row[now].clamp(min=0), slice(now.start * slots, now.stop * slots)
            p, k_TSD, v_TSD = self._scores(now)
            p.sub_(shift_of[at].view(-1, slots, 1)).exp_()
            q_TMD, dout_TMD = self._gathered(call.q_RD, row_TM), self._gathered(sums.dout_RD, row_TM)
            dp = torch.bmm(dout_TMD, v_TSD.mT)
            weights = p
            if call.dropout is not None:
                keep = self.keep(row_TM, plan.block[now, None])
                dp.mul_(keep)
                weights = p * keep
            sums.add_values(plan.block[now], torch.bmm(weights.mT, dout_TMD))
            ds = dp.sub_(delta_R[row_TM][..., None]).mul_(p)
            if dbias is not None:
                dbias[at] = ds.sum(-1).flatten()
            ds.mul_(call.scale)
            torch.bmm(ds, k_TSD, out=parts[at].view(-1, slots, call.D))
            sums.add_keys(plan.block[now], torch.bmm(ds.mT, q_TMD))
        sums.dq_RD[self.rows] = _weighted_sums(parts, plan.position, None).to(sums.dq_RD.dtype)
        if dbias is not None and sums.bias_RK is not None:
            sums.bias_RK[self.rows] = dbias[plan.position]

    def _some_tiles(self) -> Iterator[slice]:
        tiles, slots = self.plan.row.shape
        at_once = max(_SCORES // (slots * max(self.call.S, self.call.D)), 1)
        for start in range(0, tiles, at_once):
            yield slice(start, min(start + at_once, tiles))

    def _gathered(self, x_RD: Tensor, row_TM: Tensor) -> Tensor:
        rows = x_RD[self.rows].index_select(0, row_TM.flatten())
        return rows.view(*row_TM.shape, -1).to(self.call.dtype)

    def _scores(self, now: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Masked scores [T, M, S] of some tiles, and their keys and values [T, S, D]."""
        call, block = self.call, self.plan.block[now]
        row_TM = self.plan.row[now].clamp(min=0)
        k_TSD, v_TSD = (x.index_select(0, block).to(call.dtype) for x in (call.k_YSD, call.v_YSD))
        scores = torch.bmm(self._gathered(call.q_RD, row_TM), k_TSD.mT).mul_(call.scale)
        partial = self.partial[now].nonzero().flatten()
        if len(partial):
            allowed = self.allowed(row_TM[partial], block[partial, None])
            scores[partial] = scores[partial].masked_fill_(~allowed, float("-inf"))
        return scores, k_TSD, v_TSD

    def _partial(self) -> Tensor:
        """Bool [T]: tiles in which some pair may not be read."""
        keys, of, plan = self.call.keys, self.of, self.plan

        def ends(values_R: Tensor) -> tuple[Tensor, Tensor]:  # least and greatest of each tile; slots fill up in order
            at = values_R[torch.where(plan.row < 0, plan.row[:, :1], plan.row)]
            return at.amin(-1), at.amax(-1)

        first, last = ends(of.position)
        full = (self.at(keys.opens.amax(-1), plan.block) <= first) & (self.at(keys.closes.amin(-1), plan.block) > last)
        if of.document is not None and keys.documents is not None:
            first, last = ends(of.document)
            full &= (first == last) & (self.at(keys.documents.amin(-1), plan.block) == first)
            full &= self.at(keys.documents.amax(-1), plan.block) == first
        return ~full


class ByQuery(Portion):
    """Each list of blocks gathered for the rows that share it, some lists at a time."""

    def __init__(self, call: Call, of: Rows, block_LK: Tensor, sharing: int):
        super().__init__(call, of)
        self.block_LK, self.sharing = block_LK, sharing

    def forward(self) -> tuple[Tensor, Tensor]:
        call = self.call
        rows = self.rows.stop - self.rows.start
        out_RD = call.q_RD.new_zeros(rows, call.D)
        lse_R = out_RD.new_full((rows,), float("-inf"), dtype=call.dtype)
        for lists, at in self._some_lists():
            scores, _, _, v_LCD = self._scores(lists, at)
            lse = scores.logsumexp(-1, keepdim=True)
            p = (scores - lse).exp_().masked_fill_(lse == float("-inf"), 0.0)
            lse_R[at] = lse.flatten()
            if call.dropout is not None:
                p.mul_(self._keep(lists, at))
            out_RD[at] = torch.bmm(p, v_LCD).flatten(0, 1).to(out_RD.dtype)
        return out_RD, lse_R

    def backward(self, sums: Gradients) -> None:
        call, first = self.call, self.rows.start
        for lists, at in self._some_lists():
            of = slice(first + at.start, first + at.stop)
            scores, q_LGD, k_LCD, v_LCD = self._scores(lists, at)
            dout_LGD = sums.dout_RD[of].view_as(q_LGD).to(call.dtype)
            lse = sums.lse_R[of].view(*q_LGD.shape[:2], 1)
            p = (scores - torch.where(lse == float("-inf"), float("inf"), lse)).exp_()
            dp, weights = torch.bmm(dout_LGD, v_LCD.mT), p
            if call.dropout is not None:
                keep = self._keep(lists, at)
                dp.mul_(keep)
                weights = p * keep
            ds = dp.sub_(sums.delta_R[of].view_as(lse)).mul_(p)
            if sums.bias_RK is not None:
                sums.bias_RK[of] = ds.unflatten(-1, (call.K, call.S)).sum(-1).flatten(0, 1)
            ds.mul_(call.scale)
            sums.dq_RD[of] = torch.bmm(ds, k_LCD).flatten(0, 1).to(sums.dq_RD.dtype)
            block = self.block_LK[lists].flatten()
            read = block < call.Y
            every = bool(read.all())  # then nothing has to be copied
            for add, grad in (
                (sums.add_keys, torch.bmm(ds.mT, q_LGD)),
                (sums.add_values, torch.bmm(weights.mT, dout_LGD)),
            ):
                grad = grad.view(-1, call.S, call.D)
                add(*((block, grad) if every else (block[read], grad[read])))

    def _some_lists(self) -> Iterator[tuple[slice, slice]]:
        """Lists, and their rows within the portion. Without entries there is nothing to read."""
        call, lists = self.call, len(self.block_LK)
        if call.K == 0:
            return
        at_once = max(_GATHERED // (call.K * call.S * call.D), 1)
        for start in range(0, lists, at_once):
            stop = min(start + at_once, lists)
            yield slice(start, stop), slice(start * self.sharing, stop * self.sharing)

    def _row(self, at: slice) -> Tensor:
        return torch.arange(at.start, at.stop, device=self.call.device).view(-1, self.sharing)

    def _keep(self, lists: slice, at: slice) -> Tensor:
        return self.keep(self._row(at), self.block_LK[lists].clamp(max=self.call.Y - 1).long())

    def _scores(self, lists: slice, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masked scores [L, g, K · S] with the bias, and q [L, g, D], k, v [L, K · S, D]."""
        call = self.call
        block_LK = self.block_LK[lists]
        block = block_LK.clamp(max=call.Y - 1).long()
        k_LCD, v_LCD = (
            x.index_select(0, block.flatten()).view(len(block), -1, call.D).to(call.dtype)
            for x in (call.k_YSD, call.v_YSD)
        )
        of = slice(self.rows.start + at.start, self.rows.start + at.stop)
        q_LGD = call.q_RD[of].view(-1, self.sharing, call.D).to(call.dtype)
        scores = torch.bmm(q_LGD, k_LCD.mT).mul_(call.scale)
        if call.bias_RK is not None:
            scores.unflatten(-1, (call.K, call.S)).add_(call.bias_RK[of].view(*q_LGD.shape[:2], call.K, 1))
        allowed = self.allowed(self._row(at), block)
        allowed &= (block_LK < call.Y).repeat_interleave(call.S, 1)[:, None]
        return scores.masked_fill_(~allowed, float("-inf")), q_LGD, k_LCD, v_LCD


def _weighted_sums(parts: Tensor, position_RK: Tensor, weight_RK: Tensor | None) -> Tensor:
    """Σ_k weight[r, k] · parts[position[r, k]]: [R, D]; without weights the plain sum."""
    if position_RK.shape[1] == 0:
        return parts.new_zeros(len(position_RK), parts.shape[1])
    return F.embedding_bag(position_RK, parts, per_sample_weights=weight_RK, mode="sum")  # no copy of what it gathers
