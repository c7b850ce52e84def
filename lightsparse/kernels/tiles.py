"""The walk of the `blocked` backend over the rows of a layout: gathered keys and values, masked scores of a tile.

Names: Z = batch × heads that walk a table of their own, G = query heads that share its keys, M = queries of one tile
(with those of the group), S = keys of one tile, D = head dim, T = tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.kernels.dropout import Dropout, keep_scale
from lightsparse.kernels.plan import Step, steps
from lightsparse.kernels.tile_mask import RowMask, TileMasks
from lightsparse.kernels.workspace import workspace
from lightsparse.patterns.layout import BlockLayout

# Score elements worked on at once: two such tiles and the keys beside them fit into a megabyte or two of cache.
_CACHED_SCORES = 1 << 17


class Follower(Protocol):
    """Something that stays in step with the moves of the blocks: the gradients of keys and values."""

    def follow(self, step: Step) -> None: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Portion:
    """Some z of a tile: as many as are computed at once. All but `zs` are views of buffers."""

    zs: slice
    keys_ZSD: Tensor
    values_ZSD: Tensor
    scores_ZMS: Tensor
    scores_ZGQKS: Tensor  # the same by query of the tile, slot, and key of the slot


@dataclass(frozen=True)
class Tile:
    """One row of the table: its queries against the keys in the buffer."""

    step: Step
    queries: slice
    rows: int  # M
    keys: int  # S
    portions: list[Portion]


class Pass:
    """What forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        bias: Tensor | None,
        dropout: Dropout | None,
    ):
        self.B, self.H, _, self.dim = q.shape
        self.Hkv, self.table_heads = k.shape[1], layout.kv_indices.shape[1]
        self.layout, self.scale, self.dropout = layout, scale, dropout
        self.dtype, self.device = compute_dtype(q.dtype, q.device), q.device
        # Query heads of one group share gathered keys, unless every query head has a table of its own.
        self.Hz = self.H if self.table_heads == self.H else self.Hkv
        self.G, self.Z = self.H // self.Hz, self.B * self.Hz
        self.q_ZGND = self.split_heads(q)
        self.kv_block, self.blocks = layout.kv_block, layout.num_kv_blocks
        self.k_blocks, self.v_blocks = self.blocks_of(k), self.blocks_of(v)

        batch = layout.full_tiles.shape[0]
        table_TNK = layout.kv_indices.expand(batch, -1, -1, -1).flatten(0, 1)
        self.masks = TileMasks(layout, table_TNK, self.dtype)
        self.tables = [[[j for j in row if j >= 0] for row in table] for table in table_TNK.tolist()]
        self.max_width = max((len(row) for table in self.tables for row in table), default=0)
        self.z_of, self.kv_of = self._owners(batch)
        self.bias_ZGNK = None
        if bias is not None:
            bias = bias.repeat_interleave(self.H // bias.shape[1], 1).expand(self.B, -1, -1, -1)
            self.bias_ZGNK = bias.reshape(self.Z, self.G, *bias.shape[2:])

    def _owners(self, batch: int) -> tuple[list[slice], list[slice]]:
        """Of each table, the z that read it and their rows of `blocks_of`."""
        every = (slice(0, self.Z), slice(0, self.B * self.Hkv))
        owners = []
        for t in range(len(self.tables)):
            sample, head = divmod(t, self.table_heads)
            kv_head = head // (self.Hz // self.Hkv)
            if self.table_heads == 1 and batch == 1:
                owners.append(every)
            elif self.table_heads == 1:
                owners.append(tuple(slice(sample * n, (sample + 1) * n) for n in (self.Hz, self.Hkv)))
            elif batch == 1:  # the same head of all samples
                owners.append((slice(head, self.Z, self.Hz), slice(kv_head, self.B * self.Hkv, self.Hkv)))
            else:
                z, kv = sample * self.Hz + head, sample * self.Hkv + kv_head
                owners.append((slice(z, z + 1), slice(kv, kv + 1)))
        return [z for z, _ in owners], [kv for _, kv in owners]

    def tiles(self, sums: Follower | None = None) -> Iterator[Tile]:
        """Rows with something to read, keys and values loaded."""
        n = self.layout.num_queries
        buffers: tuple[Tensor, ...] = ()
        portions: list[Portion] = []
        rows = 0
        for step in steps(self.tables, reuse=self.bias_ZGNK is None):
            if sums is not None:
                sums.follow(step)
            if step.width == 0:
                continue
            start = step.row * self.layout.q_block
            queries = slice(start, min(start + self.layout.q_block, n))
            if step.fresh:
                buffers = (self.slots("keys", step.width, self.dtype), self.slots("values", step.width, self.dtype))
            if step.fresh or rows != self.G * (queries.stop - start):
                rows = self.G * (queries.stop - start)
                portions = list(self._portions(*buffers, rows))
            for buffer, source in zip(buffers, (self.k_blocks, self.v_blocks), strict=True):
                for t, slot, block, count in step.loads:
                    buffer[self.z_of[t], slot : slot + count] = source[self.kv_of[t], block : block + count]
                for t, slots in enumerate(step.spare):  # what was there before could be no number
                    for slot in slots:
                        buffer[self.z_of[t], slot].zero_()
            yield Tile(step, queries, rows, step.width * self.kv_block, portions)
        if sums is not None:
            sums.flush()

    def _portions(self, keys: Tensor, values: Tensor, rows: int) -> Iterator[Portion]:
        width = keys.shape[1]
        at_once = max(_CACHED_SCORES // (rows * width * self.kv_block), 1)
        for start in range(0, self.Z, at_once):
            zs = slice(start, min(start + at_once, self.Z))
            k, v = (slots[zs].view(zs.stop - start, -1, self.dim) for slots in (keys, values))
            scores = self.shaped("scores", k.shape[0], rows, k.shape[1])
            by_slot = scores.view(k.shape[0], self.G, rows // self.G, width, self.kv_block)
            yield Portion(zs, k, v, scores, by_slot)

    def probabilities(self, tile: Tile, portion: Portion) -> Tensor:
        """Softmax of the masked scores over the row's whole selection, in place; 0 in rows that read nothing."""
        scores = portion.scores_ZMS
        empty = None
        if self.row_mask(tile).may_be_empty or self.layout.mask.dense is not None:
            empty = scores.amax(-1, keepdim=True) == float("-inf")
        torch.softmax(scores, -1, out=scores)
        # A row with no visible key would be softmax(−inf) = NaN; by definition it is zero.
        return scores if empty is None else scores.masked_fill_(empty, 0.0)

    def fill_scores(self, tile: Tile, portion: Portion) -> Tensor:
        """Masked, scaled scores [z, M, S] in the portion's buffer; −inf where a query may not read."""
        step, scores, by_slot = tile.step, portion.scores_ZMS, portion.scores_ZGQKS
        q_ZMD = self.of_tile(self.q_ZGND, tile, portion.zs, "q")
        torch.baddbmm(scores, q_ZMD, portion.keys_ZSD.mT, beta=0, alpha=self.scale, out=scores)
        if self.bias_ZGNK is not None:
            bias_ZGK = self.bias_ZGNK[portion.zs, :, step.row, : step.width]
            by_slot.add_(bias_ZGK[:, :, None, :, None].to(self.dtype))
        for t, block, bias_QK in self.row_mask(tile).tiles:
            owners = _within(self.z_of[t], portion.zs)
            if owners is not None:
                by_slot[owners, :, :, step.slot_of[t][block]].add_(bias_QK[: by_slot.shape[2]])
        for t, slots in enumerate(step.spare):
            owners = _within(self.z_of[t], portion.zs) if slots else None
            if owners is not None:
                for slot in slots:
                    by_slot[owners, :, :, slot].fill_(float("-inf"))
        if self.layout.mask.dense is not None:
            by_slot.add_(self._dense_mask(tile)[portion.zs].view(by_slot.shape))
        return scores

    def keep(self, tile: Tile) -> Tensor:
        """Dropout's 0 or 1 / (1 − rate) for each weight of the tile: [Z, M, S]."""
        assert self.dropout is not None
        keys_BHS = self._key_numbers(tile).repeat_interleave(self.H // self.table_heads, 1)
        positions = self.layout.mask.q_pos[:, tile.queries]
        heads = torch.arange(self.H, device=self.device)
        return keep_scale(self.dropout, heads, positions, keys_BHS, self.dtype).reshape(self.Z, tile.rows, tile.keys)

    def row_mask(self, tile: Tile) -> RowMask:
        return self.masks.row(tile.step.row)

    def of_tile(self, x_ZGND: Tensor, tile: Tile, zs: slice, name: str) -> Tensor:
        """The tile's rows of x in the dtype of the products: [z, M, D]."""
        part = x_ZGND[zs, :, tile.queries]
        if part.dtype == self.dtype:
            return part.reshape(-1, tile.rows, self.dim)
        rows = self.shaped(name, part.shape[0], tile.rows, self.dim)
        rows.view(part.shape).copy_(part)
        return rows

    def slots(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        """The slot buffer `name`: [Z, width, kv_block · D]."""
        features = self.kv_block * self.dim
        size = self.Z * self.max_width * features
        buffer = workspace().take(name, size, dtype, self.device)
        return buffer[: self.Z * width * features].view(self.Z, width, features)

    def shaped(self, name: str, count: int, rows: int, columns: int) -> Tensor:
        """The front of a buffer as [count, rows, columns]: contiguous, as the matmul libraries want it."""
        return workspace().take(name, count * rows * columns, self.dtype, self.device).view(count, rows, columns)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, H, N, …] → [Z, G, N, …]"""
        return x.reshape(self.Z, self.G, *x.shape[2:])

    def blocks_of(self, x: Tensor) -> Tensor:
        """[B, Hkv, N, D] → [B · Hkv, blocks, kv_block · D], padded with zeros."""
        missing = self.blocks * self.kv_block - x.shape[2]
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(self.B * self.Hkv, self.blocks, self.kv_block * self.dim)

    def _key_numbers(self, tile: Tile) -> Tensor:
        """The key that stands in each column of the tile: int64 [B|1, table heads, S]."""
        block_of = [{slot: block for block, slot in held.items()} for held in tile.step.slot_of]
        blocks = torch.tensor([[of.get(slot, 0) for slot in range(tile.step.width)] for of in block_of])
        keys_TS = (blocks[..., None] * self.kv_block + torch.arange(self.kv_block)).flatten(1)
        return keys_TS.view(-1, self.table_heads, tile.keys).to(self.device)

    def _dense_mask(self, tile: Tile) -> Tensor:
        """The explicit mask of the tile, as something to add: [Z, M, S]."""
        dense = self.layout.mask.dense
        assert dense is not None
        rows = dense[:, :, tile.queries].expand(self.B, self.H, -1, -1)
        if rows.dtype == torch.bool:
            rows = torch.zeros(rows.shape, device=rows.device).masked_fill_(~rows, float("-inf"))
        keys_BHS = self._key_numbers(tile).clamp(max=self.layout.num_keys - 1)
        keys_BHS = keys_BHS.repeat_interleave(self.H // self.table_heads, 1)
        picked = rows.gather(3, keys_BHS[:, :, None].expand(self.B, self.H, rows.shape[2], -1))
        return picked.reshape(self.Z, tile.rows, tile.keys).to(self.dtype)


def _within(owners: slice, zs: slice) -> slice | None:
    """The part of `owners` among zs, counted from zs.start; None when there is none."""
    both = range(owners.start, owners.stop, owners.step or 1)
    first = next((z for z in both if z >= zs.start), zs.stop)
    if first >= zs.stop:
        return None
    return slice(first - zs.start, min(owners.stop, zs.stop) - zs.start, owners.step)
