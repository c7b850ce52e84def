"""The `per_query` backend: every query has a list of key blocks of its own (q_block = 1). Any device.

By key block: the queries that chose a block are gathered in tiles, attend to it alone, and a query's parts are merged
by their log-sum-exp. By query: its blocks are gathered and one softmax sees them all, as in `blocked`. block_tiles.py
decides, for some lists at a time; never are all queries' gathered keys, nor the parts of all queries, in memory at
once. The backward computes the scores again. Where chunks are wide (chunk_sizes.py) no value is read: shapes decide
which way is taken and how many tiles there are, and half precision is multiplied as it is, with fp32 sums; on a CPU it
is multiplied in fp32. On CPU the same inputs give the same bits; on CUDA sums of key gradients may be taken in any
order. Names of dimensions: those of block_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.compute_dtype import compute_dtype, sum_dtype
from lightsparse.kernels.dropout import Dropout, kept
from lightsparse.kernels.operator import with_gradients
from lightsparse.kernels.torch_ops import blocked
from lightsparse.kernels.torch_ops.block_tiles import (
    BlockTiles,
    block_tiles,
    most_tiles,
    queries_per_tile,
    queries_per_tile_of_shape,
    readers,
    tiles_of,
)
from lightsparse.kernels.torch_ops.call import Call, Gradients
from lightsparse.kernels.torch_ops.lists import Lists
from lightsparse.patterns.layout import BlockLayout

_PARTS = 1 << 23  # numbers in the parts of the lists worked on at once
_SCORES = 1 << 18  # numbers in the tiles worked on at once
_WIDE_PARTS, _WIDE_SCORES = 1 << 28, 1 << 26  # where chunks are wide


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq] in fp64."""
    call = Call(q, k, v, layout, scale, bias, dropout, _dtype(q))
    out_LMD, lse_LM = call.nothing_read(q.dtype)
    for lists, tiles in _portions(call):
        if tiles is None:
            blocked.attend(lists, out_LMD, lse_LM)
        else:
            _ByBlock(lists, tiles).attend(out_LMD, lse_LM)
    out, lse = call.by_head(out_LMD), call.by_head(lse_LM)
    for queries, wide in blocked.dense_rows(layout, q):
        out[:, :, queries], lse[:, :, queries] = blocked.forward(q[:, :, queries], k, v, wide, scale, None, dropout)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if given, the block bias."""
    call = Call(q, k, v, layout, scale, bias, dropout, _dtype(q))
    sums = Gradients(call, grad_out, grad_lse)
    lse_LM = call.by_list(lse)
    delta_LM = call.by_list((grad_out.to(call.score_dtype) * out.to(call.score_dtype)).sum(-1))
    if sums.dlse_LM is not None:  # d lse / d s = p
        delta_LM = delta_LM - sums.dlse_LM
    for lists, tiles in _portions(call):
        if tiles is None:
            blocked.add_gradients(lists, sums)
        else:
            _ByBlock(lists, tiles).add_gradients(sums, lse_LM, delta_LM)
    dq, dk, dv, dbias = sums.of_inputs(k, bias)
    for queries, wide in blocked.dense_rows(layout, q):
        dlse = None if grad_lse is None else grad_lse[:, :, queries]
        dout, out_rows, lse_rows, q_rows = (x[:, :, queries] for x in (grad_out, out, lse, q))
        part = blocked.backward(dout, dlse, out_rows, lse_rows, q_rows, k, v, wide, scale, None, dropout)
        dq[:, :, queries], dk, dv = part[0], dk + part[1], dv + part[2]
    return dq, dk, dv, dbias


def _dtype(q: Tensor) -> torch.dtype:
    """Of the matrix products."""
    return compute_dtype(q.dtype, q.device) if chunk_sizes.is_wide(q.device) else sum_dtype(q)


def _portions(call: Call) -> Iterator[tuple[Lists, BlockTiles | None]]:
    """All lists, in runs that follow one another, with tiles where walking by key block is cheaper."""
    entries, blocks = call.layout.kv_indices.shape[3], len(call.k_YSD)
    if call.wide and queries_per_tile_of_shape(blocks, call.L * entries, call.M, call.S) is None:
        yield from ((lists, None) for lists in blocked.all_lists(call))  # there are no parts to keep few
        return
    parts = chunk_sizes.at_once(call.device, _PARTS, _WIDE_PARTS)
    at_once = max(parts // max(call.M * entries * call.D, 1), 1)
    for start in range(0, call.L, at_once):
        lists = Lists(call, start, min(start + at_once, call.L))
        block_LK = torch.where(lists.is_entry_LK, lists.block_LK, blocks)
        readers_Y = readers(block_LK, blocks, call.M)
        places, total = _tiling(lists, readers_Y)
        yield lists, None if places is None else block_tiles(block_LK, readers_Y, call.M, places, total)


def _tiling(lists: Lists, readers_Y: Tensor) -> tuple[int | None, int]:
    """Places of a tile, None for walking by query, and how many tiles."""
    call = lists.call
    if not call.wide:
        places = queries_per_tile(readers_Y, int(readers_Y.sum()) // call.M, call.M, call.S)
        return places, 0 if places is None else tiles_of(readers_Y, places)
    heads = (lists.stop - 1) // call.NQ - lists.start // call.NQ + 1  # that have lists among these
    blocks, entries = min(len(readers_Y), heads * call.J), lists.block_LK.numel()
    places = queries_per_tile_of_shape(blocks, entries, call.M, call.S)
    return places, 0 if places is None else most_tiles(blocks, entries, call.M, places)


class _ByBlock:
    """Tiles of queries against the one block that all of them chose."""

    def __init__(self, lists: Lists, tiles: BlockTiles):
        self.call, self.lists, self.tiles, self.of_call = lists.call, lists, tiles, slice(lists.start, lists.stop)
        self.q_RD = self.call.q_LMD[self.of_call].flatten(0, 1)
        # Places fill up in order: the first stands in for those left over, whose parts nobody reads; in a tile left
        # over it is the first query of all.
        self.query_TP = torch.where(tiles.query_TP < 0, tiles.query_TP[:, :1], tiles.query_TP).clamp_(min=0)
        self.partial_T = None
        if not self.call.wide:
            self.partial_T = self.call.is_partial(tiles.block_T, *self._position_and_document(self.query_TP))
        self.bias_RK = None if self.call.bias_LGK is None else self.call.bias_LGK[self.of_call].flatten(0, 1)

    def attend(self, out_LMD: Tensor, lse_LM: Tensor) -> None:
        """Write the lists' rows of the output and of the log-sum-exp."""
        call, tiles, places = self.call, self.tiles, self.query_TP.numel()
        parts = self.q_RD.new_zeros(places + 1, call.D, dtype=call.score_dtype)  # the last: for entries that are none
        lse = parts.new_full((places + 1,), float("-inf"), dtype=torch.float64)
        for at, of in self._some_tiles():
            scores_TPS, _, v_TSD = self._scores(at)
            most = scores_TPS.amax(-1, keepdim=True)
            # A place with no visible key would be exp(−inf + inf) = NaN; its weights are zero.
            p_TPS = torch.exp(scores_TPS.sub_(torch.where(most == float("-inf"), 0.0, most)), out=scores_TPS)
            total = p_TPS.sum(-1, keepdim=True)
            lse[of] = (most.double() + total.log()).flatten()
            if (keep_TPS := self._dropout(at)) is not None:
                p_TPS.mul_(keep_TPS)
            part = call.product(p_TPS.to(call.dtype), v_TSD, out=parts[of].view(*p_TPS.shape[:2], call.D))
            part.div_(total.clamp(min=torch.finfo(call.score_dtype).tiny))
        lse_RK = lse[tiles.position_RK]
        if self.bias_RK is not None:
            lse_RK = lse_RK + self.bias_RK
        lse_R = lse_RK.logsumexp(-1) if lse_RK.shape[1] else lse_RK.new_full(lse_RK.shape[:1], float("-inf"))
        weight_RK = (lse_RK - lse_R[:, None]).exp_().masked_fill_((lse_R == float("-inf"))[:, None], 0.0)
        weight_RK = weight_RK.to(call.score_dtype)
        out_RD = _weighted_sums(parts, tiles.position_RK, weight_RK)
        out_LMD[self.of_call] = out_RD.view(-1, call.M, call.D).to(out_LMD.dtype)
        lse_LM[self.of_call] = lse_R.view(-1, call.M)

    def add_gradients(self, sums: Gradients, lse_LM: Tensor, delta_LM: Tensor) -> None:
        """Add the lists' share of all gradients. delta: of each query Σ dp · p, less the gradient of its lse."""
        call, tiles, places = self.call, self.tiles, self.query_TP.numel()
        dout_RD, delta_R = sums.dout_LMD[self.of_call].flatten(0, 1), delta_LM[self.of_call].flatten()
        parts = self.q_RD.new_zeros(places + 1, call.D, dtype=call.score_dtype)
        dbias = None if sums.dbias_LGK is None else parts.new_zeros(places + 1)
        shift_RK = lse_LM[self.of_call].flatten()[:, None]
        shift_RK = torch.where(shift_RK == float("-inf"), float("inf"), shift_RK)
        if self.bias_RK is not None:
            shift_RK = shift_RK - self.bias_RK
        shift = torch.full((places + 1,), float("inf"), dtype=torch.float64, device=call.device)
        shift[tiles.position_RK] = shift_RK.expand(tiles.position_RK.shape)  # elsewhere exp(−inf) = 0: nothing counts
        most = shift.to(call.score_dtype)
        rest = (shift - most).masked_fill_(shift == float("inf"), 0.0).to(call.score_dtype)
        for at, of in self._some_tiles():
            p_TPS, k_TSD, v_TSD = self._scores(at)
            of_query = (*p_TPS.shape[:2], 1)
            p_TPS.sub_(most[of].view(of_query)).sub_(rest[of].view(of_query)).exp_()
            dout_TPD = self._gathered(dout_RD, at)
            dp_TPS, weights_TPS = call.product(dout_TPD, v_TSD.mT), p_TPS
            if (keep_TPS := self._dropout(at)) is not None:
                dp_TPS.mul_(keep_TPS)
                weights_TPS = p_TPS * keep_TPS
            ds_TPS = dp_TPS.sub_(delta_R[self.query_TP[at]][..., None]).mul_(p_TPS)
            if dbias is not None:
                dbias[of] = ds_TPS.sum(-1).flatten()
            ds_TPS, weights_TPS = ds_TPS.to(call.dtype), weights_TPS.to(call.dtype)
            call.product(ds_TPS, k_TSD, out=parts[of].view(*p_TPS.shape[:2], call.D))
            dk_TSD = call.product(ds_TPS.mT, self._gathered(self.q_RD, at))
            sums.add_keys(tiles.block_T[at], dk_TSD, call.product(weights_TPS.mT, dout_TPD))
        sums.dq_LMD[self.of_call] = _weighted_sums(parts, tiles.position_RK, None).view(-1, call.M, call.D)
        if dbias is not None and sums.dbias_LGK is not None:
            sums.dbias_LGK[self.of_call] = dbias[tiles.position_RK].view(-1, call.G, tiles.position_RK.shape[1])

    def _some_tiles(self) -> Iterator[tuple[slice, slice]]:
        """Tiles, and their places."""
        tiles, places = self.query_TP.shape
        scores = chunk_sizes.at_once(self.call.device, _SCORES, _WIDE_SCORES)
        at_once = max(scores // (places * max(self.call.S, self.call.D)), 1)
        for start in range(0, tiles, at_once):
            stop = min(start + at_once, tiles)
            yield slice(start, stop), slice(start * places, stop * places)

    def _gathered(self, x_RD: Tensor, at: slice) -> Tensor:
        """Rows of the queries in some tiles: [T, P, D]."""
        query_TP = self.query_TP[at]
        return x_RD.index_select(0, query_TP.flatten()).view(*query_TP.shape, -1).to(self.call.dtype)

    def _scores(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Masked scores [T, P, S] of some tiles, and their keys and values [T, S, D]."""
        call, block_T = self.call, self.tiles.block_T[at]
        k_TSD, v_TSD = (x.index_select(0, block_T).to(call.dtype) for x in (call.k_YSD, call.v_YSD))
        scores_TPS = call.scores(self._gathered(self.q_RD, at), k_TSD)
        if self.partial_T is None:  # a mask for all costs less than finding out who needs one
            allowed = call.may_read(block_T, *self._position_and_document(self.query_TP[at]))
            return scores_TPS.masked_fill_(~allowed, float("-inf")), k_TSD, v_TSD
        partial = self.partial_T[at].nonzero().flatten()
        if len(partial):
            allowed = call.may_read(block_T[partial], *self._position_and_document(self.query_TP[at][partial]))
            scores_TPS[partial] = scores_TPS[partial].masked_fill_(~allowed, float("-inf"))
        return scores_TPS, k_TSD, v_TSD

    def _position_and_document(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        document_LM = self.lists.document_LM
        return self.lists.position_LM.flatten()[query], None if document_LM is None else document_LM.flatten()[query]

    def _dropout(self, at: slice) -> Tensor | None:
        """Dropout's factor of each weight of some tiles, 0 or 1 / (1 − rate)."""
        call, hash_LM = self.call, self.lists.hash_LM
        if call.dropout is None or call.key_hashes is None or hash_LM is None:
            return None
        of_keys_TS = call.at(call.key_hashes, self.tiles.block_T[at])
        return kept(
            call.dropout.rate, hash_LM.flatten()[self.query_TP[at]][..., None], of_keys_TS[:, None], call.score_dtype
        )


def _weighted_sums(parts: Tensor, position_RK: Tensor, weight_RK: Tensor | None) -> Tensor:
    """Σ_k weight[r, k] · parts[position[r, k]]: [R, D]; without weights the plain sum."""
    if position_RK.shape[1] == 0:
        return parts.new_zeros(len(position_RK), parts.shape[1])
    return F.embedding_bag(position_RK, parts, per_sample_weights=weight_RK, mode="sum")  # no copy of what it gathers


per_query_attention = with_gradients("per_query", forward, backward)
