"""Lists of key blocks against the queries that read them: masked scores, dropout. Names: those of call.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.dropout import kept, row_hashes
from lightsparse.kernels.torch_ops.call import Call

_NUMBERS = 1 << 20  # scores, gathered keys and values of the lists worked on at once
_WIDE_NUMBERS = 1 << 26  # where chunks are wide


class Lists:
    """Lists start … stop − 1 of a call.

    block_LK     int64: key blocks, numbered over all heads; behind the end of a list its first one stands in
    is_entry_LK  bool: whether an entry is before the end
    partial_LK   bool: whether the queries may read only a part of it
    """

    def __init__(self, call: Call, start: int, stop: int):
        self.call, self.start, self.stop = call, start, stop
        table, mask = call.layout.kv_indices, call.layout.mask
        number = torch.arange(start, stop, device=call.device)
        sample, head, row = number // call.NQ // call.U, number // call.NQ % call.U, number % call.NQ
        column_LK = table[sample % len(table), head % table.shape[1], row].long()
        self.is_entry_LK = column_LK >= 0
        column_LK = torch.where(self.is_entry_LK, column_LK, column_LK[:, :1].clamp(min=0))
        kv_head = sample * call.Hkv + head // (call.U // call.Hkv)
        self.block_LK = kv_head[:, None] * call.J + column_LK

        place = torch.arange(call.M, device=call.device)
        self.sample_L1, self.head_LM = sample[:, None], head[:, None] * call.G + place % call.G
        self.query_LM = (row[:, None] * call.Q + place // call.G).clamp(max=call.N - 1)
        self.position_LM = mask.q_pos[self.sample_L1 % len(mask.q_pos), self.query_LM]
        self.document_LM = self.hash_LM = None
        if mask.q_doc is not None and call.documents is not None:
            self.document_LM = mask.q_doc[self.sample_L1 % len(mask.q_doc), self.query_LM]
        if call.dropout is not None:
            self.hash_LM = row_hashes(call.dropout.keys[self.sample_L1], self.head_LM, self.position_LM)
        document_L1M = None if self.document_LM is None else self.document_LM[:, None]
        self.partial_LK = call.is_partial(self.block_LK, self.position_LM[:, None], document_L1M) | ~self.is_entry_LK

    def parts(self) -> Iterator[Part]:
        """A few lists of about one length at once, cut to the longest of them; those without entries are left out.

        Lists of single queries, where chunks are wide: in their order at full width, so that no length is read. They
        are of nearly one length; those of tiles are not, and one look at their lengths saves more than it costs.
        """
        call = self.call
        if call.wide and call.Q == 1:
            lists, entries = self.block_LK.shape
            order_L = torch.arange(lists, device=call.device)
            at_once = max(_WIDE_NUMBERS // max(entries * call.S * (call.M + 2 * call.D), 1), 1)
            for start in range(0, lists if entries else 0, at_once):
                yield Part(self, order_L[start : start + at_once], entries)
            return
        length_L, order_L = self.is_entry_LK.sum(-1).sort(stable=True)
        lengths = length_L.tolist()
        numbers = chunk_sizes.at_once(call.device, _NUMBERS, _WIDE_NUMBERS)
        at_once = max(numbers // max(lengths[-1] * call.S * (call.M + 2 * call.D), 1), 1)
        for start in range(lengths.count(0), len(lengths), at_once):
            stop = min(start + at_once, len(lengths))
            yield Part(self, order_L[start:stop], lengths[stop - 1])


class Part:
    """Lists `at` of some lists, their first K entries."""

    def __init__(self, lists: Lists, at: Tensor, K: int):
        self.call, self.lists, self.at, self.K = lists.call, lists, at, K
        self.of_call = lists.start + at
        self.q_LMD, self.block_LK = self.call.q_LMD[self.of_call], lists.block_LK[at, :K]

    def gathered(self, x_YSD: Tensor) -> Tensor:
        """Keys or values of each list, side by side: [L, C, D]."""
        x_XSD = x_YSD.index_select(0, self.block_LK.flatten())
        return x_XSD.view(len(self.block_LK), -1, self.call.D).to(self.call.dtype)

    def masked_scores(self, k_LCD: Tensor) -> Tensor:
        """[L, M, C]; −inf where a query may not read."""
        call, lists, at = self.call, self.lists, self.at
        scores_LMC = call.scores(self.q_LMD, k_LCD)
        scores_LMKS = scores_LMC.unflatten(-1, (self.K, call.S))
        if call.bias_LGK is not None:
            bias_LGK = call.bias_LGK[self.of_call, :, : self.K].to(call.score_dtype)
            scores_LMKS.unflatten(1, (call.Q, call.G)).add_(bias_LGK[:, None, ..., None])
        position_LM, document_LM = lists.position_LM[at], None if lists.document_LM is None else lists.document_LM[at]
        if call.wide:  # a mask for all costs less than finding out who needs one
            document_L1M = None if document_LM is None else document_LM[:, None]
            allowed_LKMS = call.may_read(self.block_LK, position_LM[:, None], document_L1M)
            allowed_LKMS &= lists.is_entry_LK[at, : self.K, None, None]
            scores_LMKS.masked_fill_(~allowed_LKMS.transpose(1, 2), float("-inf"))
        else:
            l, k = lists.partial_LK[at, : self.K].nonzero(as_tuple=True)
            allowed = call.may_read(
                self.block_LK[l, k], position_LM[l], None if document_LM is None else document_LM[l]
            )
            allowed &= lists.is_entry_LK[at][l, k, None, None]
            scores_LMKS[l, :, k] = scores_LMKS[l, :, k].masked_fill_(~allowed, float("-inf"))
        if (explicit := call.layout.mask.dense) is not None:
            key_LC = (self.block_LK % call.J * call.S)[..., None] + torch.arange(call.S, device=call.device)
            key_L1C = key_LC.flatten(1)[:, None].clamp(max=call.layout.num_keys - 1)
            sample, head, query = (x[at][..., None] for x in (lists.sample_L1, lists.head_LM, lists.query_LM))
            explicit_LMC = explicit[sample % len(explicit), head % explicit.shape[1], query, key_L1C]
            if explicit.dtype == torch.bool:
                explicit_LMC = torch.zeros_like(scores_LMC).masked_fill_(~explicit_LMC, float("-inf"))
            scores_LMC.add_(explicit_LMC)
        return scores_LMC

    def dropout_LMC(self) -> Tensor | None:
        """Dropout's factor of each weight, 0 or 1 / (1 − rate)."""
        call, hash_LM = self.call, self.lists.hash_LM
        if call.dropout is None or call.key_hashes is None or hash_LM is None:
            return None
        of_keys_LC = call.at(call.key_hashes, self.block_LK).flatten(1)
        return kept(call.dropout.rate, hash_LM[self.at][..., None], of_keys_LC[:, None], call.score_dtype)
