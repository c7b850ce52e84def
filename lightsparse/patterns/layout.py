"""BlockLayout: which key blocks each query block reads. Every variant reduces to one; kernels know nothing else.

Token i reads key j iff block(j) is in kv_indices[block(i)] (or block(i) is a dense row) and mask(i, j).
A row with nothing to read gives output 0 and lse −inf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightsparse.patterns.mask import ElementMask


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A table of key blocks per query block, and the token-level rule inside them.

    kv_indices  int32 [B|1, H|Hkv|1, NQ, K]: ascending key-block ids, −1 padded at the end
    q_block     queries per row of the table
    kv_block    keys per block
    mask        ElementMask over Nq queries and Nkv keys; neither needs to be a multiple of its block
    dense_rows  int32 [R]: query blocks that read every block; their rows in kv_indices are all −1
    """

    kv_indices: Tensor
    q_block: int
    kv_block: int
    mask: ElementMask
    dense_rows: Tensor

    def __post_init__(self) -> None:
        expected = -(-self.num_queries // self.q_block)
        if self.kv_indices.dim() != 4 or self.kv_indices.shape[2] != expected:
            raise ValueError(
                f"kv_indices has shape {tuple(self.kv_indices.shape)}; {self.num_queries} queries in blocks of "
                f"{self.q_block} need [B|1, H|Hkv|1, {expected}, K]"
            )
        if self.kv_indices.dtype != torch.int32:
            raise ValueError(f"kv_indices is {self.kv_indices.dtype}; block ids are torch.int32")

    @property
    def num_queries(self) -> int:
        return self.mask.num_queries

    @property
    def num_keys(self) -> int:
        return self.mask.num_keys

    @property
    def num_tokens(self) -> int:
        """Keys that are tokens; they lead, and the appended ones, if any, begin at the next whole block."""
        return self.num_keys if self.mask.num_tokens is None else self.mask.num_tokens

    @property
    def num_q_blocks(self) -> int:
        return self.kv_indices.shape[2]

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.num_keys // self.kv_block)

    def block_map(self) -> Tensor:
        """Bool [B|1, H|Hkv|1, NQ, NKVB]: True where the tile is computed. Quadratic in blocks: tests and pictures."""
        table = self.kv_indices.long()
        chosen = torch.zeros(*table.shape[:3], self.num_kv_blocks + 1, dtype=torch.bool, device=table.device)
        chosen.scatter_(3, torch.where(table < 0, self.num_kv_blocks, table), True)
        chosen[:, :, self.dense_rows.long()] = True
        return chosen[..., :-1]

    def to_dense(self) -> Tensor:
        """Bool [B|1, H|Hkv|1, Nq, Nkv]: True where query i reads key j. Quadratic in tokens: tests and pictures."""
        tiles = self.block_map().repeat_interleave(self.q_block, 2).repeat_interleave(self.kv_block, 3)
        allowed = tiles[:, :, : self.num_queries, : self.num_keys] & self.mask.to_dense()
        if self.mask.dense is not None:
            explicit = self.mask.dense
            if explicit.shape[1] > 1:  # it differs by query head, the table perhaps by key/value head
                allowed = allowed.repeat_interleave(explicit.shape[1] // allowed.shape[1], 1)
            allowed = allowed & (explicit if explicit.dtype == torch.bool else explicit > float("-inf"))
        return allowed

    @cached_property
    def full_tiles(self) -> Tensor:
        """Bool, the shape of kv_indices: True where every pair of the tile may be read, so that no mask is needed."""
        mask, table = self.mask, self.kv_indices.clamp(min=0).long()
        opens = _of_blocks(mask.visible_from, self.kv_block, "max")
        closes = _of_blocks(mask.visible_until, self.kv_block, "min")
        first_q, last_q = (_of_blocks(mask.q_pos, self.q_block, of) for of in ("min", "max"))
        batch = max(t.shape[0] for t in (table, opens, closes, first_q))
        if mask.q_doc is not None and mask.kv_doc is not None:
            batch = max(batch, mask.q_doc.shape[0], mask.kv_doc.shape[0])
        table = table.expand(batch, -1, -1, -1)

        def at(of_block: Tensor) -> Tensor:
            return of_block[:, None, None, :].expand(*table.shape[:3], -1).gather(3, table)

        full = (at(opens) <= first_q[:, None, :, None]) & (at(closes) > last_q[:, None, :, None])
        if mask.q_doc is not None and mask.kv_doc is not None:
            q_first, q_last = (_of_blocks(mask.q_doc, self.q_block, of) for of in ("min", "max"))
            k_first, k_last = (_of_blocks(mask.kv_doc, self.kv_block, of) for of in ("min", "max"))
            full &= (at(k_first) == q_first[:, None, :, None]) & (at(k_last) == q_last[:, None, :, None])
            full &= (q_first == q_last)[:, None, :, None]
        ends_early = self.num_keys % self.kv_block != 0
        if ends_early:
            full &= table != self.num_kv_blocks - 1
        if mask.dense is not None:
            full = torch.zeros_like(full)
        return full & (self.kv_indices >= 0)

    def density(self) -> float:
        """Query–key area of the computed tiles ÷ area of the tiles of dense attention over the same documents.

        Mean over batch and query heads. Keys beside the tokens (summaries) count above the line only.
        """
        return self._density

    @cached_property
    def _density(self) -> float:
        computed, dense = self.areas()
        return float((computed / dense[:, None]).mean())

    def areas(self) -> tuple[Tensor, Tensor]:
        """Query–key area of the computed tiles, fp64 [B|1, H|Hkv|1], and of dense attention's, fp64 [B|1]: pairs."""
        computed, dense = self._areas_of_rows()
        return computed.sum(-1), dense.sum(-1)

    def row_areas(self) -> Tensor:
        """Query–key area of the computed tiles of each query block, mean over batch and heads: fp64 [NQ]."""
        return self._areas_of_rows()[0].mean((0, 1))

    def _areas_of_rows(self) -> tuple[Tensor, Tensor]:
        """As `areas`, by query block: fp64 [B|1, H|Hkv|1, NQ] and [B|1, NQ]."""
        mask = self.mask
        q_area = _block_lengths(self.num_queries, self.q_block, mask.device)
        token_area = _block_lengths(self.num_tokens, self.kv_block, mask.device)
        appended = max(self.num_keys - len(token_area) * self.kv_block, 0)  # the tokens' last block may be short
        k_area = torch.cat([token_area, _block_lengths(appended, self.kv_block, mask.device)])
        area_before = torch.cat([k_area.new_zeros(1), k_area.cumsum(0)])  # keys before block J

        first, last = self._dense_span()
        dense_area = area_before[last + 1] - area_before[first]  # [B|1, NQ]
        chosen_area = torch.where(self.kv_indices >= 0, k_area[self.kv_indices.clamp(min=0).long()], 0).sum(-1)
        is_dense_row = torch.zeros(self.num_q_blocks, dtype=torch.bool, device=mask.device)
        is_dense_row[self.dense_rows.long()] = True
        chosen_area = torch.where(is_dense_row, dense_area[:, None], chosen_area).double()
        return chosen_area * q_area, dense_area.double() * q_area

    def _dense_span(self) -> tuple[Tensor, Tensor]:
        """First and last key block of each row under dense attention over the same documents: two int64 [B|1, NQ]."""
        mask = self.mask
        last_q = _of_blocks(mask.q_pos, self.q_block, "max")
        last_key = last_q if mask.causal else torch.full_like(last_q, self.num_tokens - 1)
        first_key = torch.zeros_like(last_key)
        if mask.q_doc is not None and mask.kv_doc is not None:
            q_first, q_last = (_of_blocks(mask.q_doc, self.q_block, of) for of in ("min", "max"))
            docs = mask.kv_doc[:, : self.num_tokens].expand(len(q_first), -1).contiguous()
            first_key = torch.searchsorted(docs, q_first.contiguous())
            document_end = torch.searchsorted(docs, q_last.contiguous(), right=True) - 1
            last_key = torch.minimum(last_key, document_end)
        return first_key.long() // self.kv_block, last_key.clamp(max=self.num_tokens - 1).long() // self.kv_block

    def per_token(self, start: int, stop: int) -> BlockLayout:
        """The rows of queries start … stop − 1, one row per query (q_block = 1): decoding at any offset."""
        row = torch.arange(start, stop, device=self.kv_indices.device) // self.q_block
        dense = torch.isin(row, self.dense_rows.long()).nonzero().flatten().to(torch.int32)
        return replace(
            self,
            kv_indices=self.kv_indices[:, :, row].contiguous(),
            q_block=1,
            mask=self.mask.queries(start, stop),
            dense_rows=dense,
        )

    def to_flex(self, batch: int = 1, heads: int = 1):
        """FlexAttention's BlockMask of this layout. Needs full-width lists: [batch, heads, NQ, NKVB] int32.

        Tiles without a masked pair go to its full list. Eager flex_attention ignores the lists; compile it.
        """
        from torch.nn.attention.flex_attention import BlockMask

        if self.mask.dense is not None:
            raise ValueError("mask.dense is set; FlexAttention takes no dense mask, use backend=blocked")
        chosen = self.block_map()
        chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1).expand(batch, heads, -1, -1)
        table = self.kv_indices.long()
        full_tiles = self.full_tiles
        table = table.expand(full_tiles.shape[0], -1, -1, -1)
        full = torch.zeros(*table.shape[:3], self.num_kv_blocks + 1, dtype=torch.bool, device=table.device)
        full.scatter_(3, torch.where(full_tiles, table, self.num_kv_blocks), True)
        full = full[..., :-1].repeat_interleave(heads // table.shape[1], 1).expand(batch, heads, -1, -1)

        def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.argsort((~tiles).to(torch.int8), dim=-1, stable=True).to(torch.int32)
            return tiles.sum(-1, dtype=torch.int32).contiguous(), order.contiguous()

        partial_count, partial_ids = listed(chosen & ~full)
        full_count, full_ids = listed(full)
        return BlockMask.from_kv_blocks(
            partial_count,
            partial_ids,
            full_count,
            full_ids,
            BLOCK_SIZE=(self.q_block, self.kv_block),
            mask_mod=self.mask,
            seq_lengths=(self.num_queries, self.num_keys),
        )


def _of_blocks(values: Tensor, block: int, of: str) -> Tensor:
    """Minimum or maximum of each run of `block` entries of [B, N]: [B, ceil(N / block)]."""
    missing = -values.shape[1] % block
    if missing:  # repeating the last value changes neither minimum nor maximum
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    blocks = values.unflatten(1, (-1, block))
    return blocks.amin(-1) if of == "min" else blocks.amax(-1)


def _block_lengths(n: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block: int64 [ceil(n / block)]; the last may be short."""
    starts = torch.arange(0, n, block, device=device)
    return (n - starts).clamp(max=block)


def no_dense_rows(device: torch.device | str) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=device)
