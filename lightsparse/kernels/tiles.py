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
    owners: list[slice | None]  # per table, the z among these that read it
    held: dict[str, Tensor]  # the gathered [z, S, D]: "k", "v", and in columns "k.T", "v.T"
    scores_ZMS: Tensor
    scores_ZGQKS: Tensor  # the same by query of the tile, slot, and key of the slot


@dataclass(frozen=True)
class Tile:
    """One row of the table: its queries against the keys in the buffer."""

    step: Step
    queries: slice
    rows: int  # M
    keys: int  # S
    mask: RowMask
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
        self.dtype, self.device = q.dtype, q.device
        # Query heads of one group share gathered keys, unless every query head has a table of its own.
        self.Hz = self.H if self.table_heads == self.H else self.Hkv
        self.G, self.Z = self.H // self.Hz, self.B * self.Hz
        self.q_ZGND = self.split_heads(q)
        self.kv_block, self.blocks = layout.kv_block, layout.num_kv_blocks
        self.sources = {"k": self.keys_of(k), "v": self.keys_of(v)}

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
        """Of each table, the z that read it and their rows of `keys_of`."""
        every = (slice(0, self.Z), slice(0, self.B * self.Hkv))
        owners: list[tuple[slice, slice]] = []
        for t in range(len(self.tables)):
            sample, head = divmod(t, self.table_heads)
            kv_head = head // (self.Hz // self.Hkv)
            if self.table_heads == 1 and batch == 1:
                owners.append(every)
            elif self.table_heads == 1:
                z, kv = sample * self.Hz, sample * self.Hkv
                owners.append((slice(z, z + self.Hz), slice(kv, kv + self.Hkv)))
            elif batch == 1:  # the same head of all samples
                owners.append((slice(head, self.Z, self.Hz), slice(kv_head, self.B * self.Hkv, self.Hkv)))
            else:
                z, kv = sample * self.Hz + head, sample * self.Hkv + kv_head
                owners.append((slice(z, z + 1), slice(kv, kv + 1)))
        return [z for z, _ in owners], [kv for _, kv in owners]

    def tiles(self, holding: tuple[str, ...], sums: Follower | None = None) -> Iterator[Tile]:
        """Rows with something to read, the named keys and values gathered (see Portion.held)."""
        n, block_size = self.layout.num_queries, self.kv_block
        buffers: dict[str, Tensor] = {}
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
                buffers = {name: self.slots(name, step.width, self.dtype) for name in holding}
            if step.fresh or rows != self.G * (queries.stop - start):
                rows = self.G * (queries.stop - start)
                portions = list(self._portions(buffers, rows, step.width))
            for name, buffer in buffers.items():
                source = self.sources[name[0]]
                for t, slot, block, count in step.loads:
                    of_slot, of_block = (slice(i * block_size, (i + count) * block_size) for i in (slot, block))
                    buffer[self.z_of[t], of_slot] = source[self.kv_of[t], of_block]
                for t, slots in enumerate(step.spare):  # what was there before could be no number
                    for slot in slots:
                        buffer[self.z_of[t], slot * block_size : (slot + 1) * block_size].zero_()
            yield Tile(step, queries, rows, step.width * block_size, self.masks.row(step.row), portions)
        if sums is not None:
            sums.flush()

    def _portions(self, buffers: dict[str, Tensor], rows: int, width: int) -> Iterator[Portion]:
        keys = width * self.kv_block
        at_once = max(_CACHED_SCORES // (rows * keys), 1)
        for start in range(0, self.Z, at_once):
            zs = slice(start, min(start + at_once, self.Z))
            scores = self.shaped("scores", zs.stop - start, rows, keys)
            by_slot = scores.view(len(scores), self.G, rows // self.G, width, self.kv_block)
            owners = [_within(of_table, zs) for of_table in self.z_of]
            yield Portion(zs, owners, {name: buffer[zs] for name, buffer in buffers.items()}, scores, by_slot)

    def fill_scores(self, tile: Tile, portion: Portion, q_ZMD: Tensor) -> Tensor:
        """Masked, scaled scores [z, M, S] in the portion's buffer; −inf where a query may not read."""
        step, scores, by_slot = tile.step, portion.scores_ZMS, portion.scores_ZGQKS
        torch.baddbmm(scores, q_ZMD, portion.held["k.T"].mT, beta=0, alpha=self.scale, out=scores)
        if self.bias_ZGNK is not None:
            bias_ZGK = self.bias_ZGNK[portion.zs, :, step.row, : step.width]
            by_slot.add_(bias_ZGK[:, :, None, :, None].to(self.dtype))
        for t, block, bias_QK in tile.mask.tiles:
            owners = portion.owners[t]
            if owners is not None:
                by_slot[owners, :, :, step.slot_of[t][block]].add_(bias_QK[: by_slot.shape[2]])
        for owners, slots in zip(portion.owners, step.spare, strict=True):
            if owners is not None:
                for slot in slots:
                    by_slot[owners, :, :, slot].fill_(float("-inf"))
        if self.layout.mask.dense is not None:
            by_slot.add_(self._dense_mask(tile)[portion.zs].view(by_slot.shape))
        return scores

    def probabilities(self, tile: Tile, portion: Portion) -> Tensor:
        """Softmax of the masked scores over the row's whole selection, in place; 0 in rows that read nothing."""
        scores = portion.scores_ZMS
        empty = None
        if tile.mask.may_be_empty or self.layout.mask.dense is not None:
            empty = scores.amax(-1, keepdim=True) == float("-inf")
        torch.softmax(scores, -1, out=scores)
        # A row with no visible key would be softmax(−inf) = NaN; by definition it is zero.
        return scores if empty is None else scores.masked_fill_(empty, 0.0)

    def keep(self, tile: Tile) -> Tensor:
        """Dropout's 0 or 1 / (1 − rate) for each weight of the tile: [Z, M, S]."""
        assert self.dropout is not None
        keys_BHS = self._key_numbers(tile).repeat_interleave(self.H // self.table_heads, 1)
        positions = self.layout.mask.q_pos[:, tile.queries]
        heads = torch.arange(self.H, device=self.device)
        return keep_scale(self.dropout, heads, positions, keys_BHS, self.dtype).reshape(self.Z, tile.rows, tile.keys)

    def of_tile(self, x_ZGND: Tensor, tile: Tile, zs: slice) -> Tensor:
        """The tile's rows of x: [z, M, D]."""
        return x_ZGND[zs, :, tile.queries].reshape(-1, tile.rows, self.dim)

    def slots(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        """The slot buffer `name`: [Z, S, D]; one whose name ends in .T lies in memory as [Z, D, S].

        The matmul libraries take a factor by columns up to a fifth faster than the same one by rows, transposed.
        """
        keys = width * self.kv_block
        size = self.Z * self.max_width * self.kv_block * self.dim
        buffer = workspace().take(name, size, dtype, self.device)[: self.Z * keys * self.dim]
        return buffer.view(self.Z, self.dim, keys).mT if name.endswith(".T") else buffer.view(self.Z, keys, self.dim)

    def shaped(self, name: str, count: int, rows: int, columns: int) -> Tensor:
        """The front of a buffer as [count, rows, columns]: contiguous, as the matmul libraries want it."""
        return workspace().take(name, count * rows * columns, self.dtype, self.device).view(count, rows, columns)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, H, N, …] → [Z, G, N, …]"""
        return x.reshape(self.Z, self.G, *x.shape[2:])

    def keys_of(self, x: Tensor) -> Tensor:
        """[B, Hkv, N, D] → [B · Hkv, whole blocks of keys, D], padded with zeros."""
        missing = self.blocks * self.kv_block - x.shape[2]
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(self.B * self.Hkv, -1, self.dim)

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
