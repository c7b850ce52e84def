"""The grid of blocks a pattern fills in: which rows, which columns, what causality and documents rule out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.mask import document_starts

_LAST = torch.iinfo(torch.int32).max  # sorts behind every block id


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Query blocks `rows` × key blocks of a self-attention over `seq_len` tokens, both `block` tokens wide.

    documents  int32 [B, seq_len] or None, non-decreasing along the sequence
    Raises ValueError for sizes below 1, kv_heads that do not divide heads, rows outside the sequence, and documents of
    another length or with decreasing ids.
    """

    seq_len: int  # tokens
    block: int  # tokens per block
    heads: int
    kv_heads: int
    causal: bool
    device: torch.device
    rows: range  # query blocks wanted: all of them, or a part for decoding and ranks
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "block", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads} and kv_heads is {self.kv_heads}; kv_heads must divide heads")
        if self.rows.step != 1 or self.rows.start < 0 or self.rows.stop > self.num_kv:
            raise ValueError(f"rows is {self.rows}; it must be a plain range within 0 … {self.num_kv} query blocks")
        if self.documents is not None:
            if self.documents.dim() != 2 or self.documents.shape[1] != self.seq_len:
                raise ValueError(
                    f"documents has shape {tuple(self.documents.shape)}; it must hold an id for each of the "
                    f"{self.seq_len} tokens, [B, seq_len]"
                )
            document_starts(self.documents)  # raises if ids decrease, on which everything below relies

    @property
    def num_kv(self) -> int:
        return -(-self.seq_len // self.block)

    @property
    def row_ids(self) -> Tensor:
        """Query block of each row: int32 [NQ]."""
        return torch.arange(self.rows.start, self.rows.stop, dtype=torch.int32, device=self.device)

    def visible(self, columns: Tensor, also_own: bool = False) -> Tensor:
        """Candidate key blocks → the table's form, with those outside the sequence or in the future left out.

        columns: int [C] (the same for every row) or [B|1, H|1, NQ, C]; values outside 0 … num_kv − 1 mean "none".
        Returns int32 [B|1, H|1, NQ, K], ascending, without repeats, −1 padded.
        """
        own = self.row_ids[None, None, :, None]
        columns = columns.to(torch.int32)
        table = columns.expand(1, 1, len(self.rows), -1) if columns.dim() == 1 else columns
        if also_own:
            table = torch.cat([table, own.expand(*table.shape[:3], 1)], dim=-1)
        valid = (table >= 0) & (table < self.num_kv)
        if self.causal:
            valid &= table <= own
        return compact(table, valid)

    def of_shared_documents(self, table: Tensor) -> Tensor:
        """The table without blocks that share no document with their row."""
        if self.documents is None:
            return table
        first, last = self.block_documents()
        rows = slice(self.rows.start, self.rows.stop)
        ids = table.clamp(min=0).long().expand(len(first), -1, -1, -1)

        def at(of_block: Tensor) -> Tensor:
            return of_block[:, None, None, :].expand(*ids.shape[:3], -1).gather(3, ids)

        shared = (at(last) >= first[:, None, rows, None]) & (at(first) <= last[:, None, rows, None])
        return compact(ids.to(torch.int32), shared & (table >= 0))

    def block_documents(self) -> tuple[Tensor, Tensor]:
        """First and last document id in each block: two int32 [B, num_kv]. Needs documents."""
        assert self.documents is not None
        starts = torch.arange(self.num_kv, device=self.device) * self.block
        ends = (starts + self.block - 1).clamp(max=self.seq_len - 1)
        return self.documents[:, starts], self.documents[:, ends]

    def document_spans(self) -> tuple[Tensor, Tensor]:
        """First and last token of each token's document: two int32 [B|1, seq_len]; one document without `documents`."""
        if self.documents is None:
            first = torch.zeros(1, self.seq_len, dtype=torch.int32, device=self.device)
            return first, first + (self.seq_len - 1)
        mirrored = document_starts(-self.documents.flip(1))
        return document_starts(self.documents), (self.seq_len - 1 - mirrored).flip(1)


def compact(table: Tensor, valid: Tensor) -> Tensor:
    """Keep valid entries of each row: ascending, without repeats, −1 padded, no wider than the longest row."""
    table = torch.where(valid, table, _LAST).sort(dim=-1).values
    repeated = torch.zeros_like(table, dtype=torch.bool)
    repeated[..., 1:] = (table[..., 1:] == table[..., :-1]) & (table[..., 1:] != _LAST)
    if bool(repeated.any()):
        table = torch.where(repeated, _LAST, table).sort(dim=-1).values
    width = int((table != _LAST).sum(-1).max()) if table.numel() else 0
    table = table[..., :width]
    return torch.where(table == _LAST, -1, table).contiguous()
