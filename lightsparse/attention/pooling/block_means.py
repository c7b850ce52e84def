"""Block summaries for a router: means of queries and keys that never see the future nor another document.

A causal row chooses by the mean query of the block before it, so nothing of its own tokens is in its choice. With
packed documents a mean pools tokens of one document. A row's earlier blocks can only belong to the document of its
first token, its later blocks to that of its last token; seen from a key block it is the other way round.

Shapes: B batch, H heads, N tokens, D head_dim, R rows (query blocks), C columns (key blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.context_parallel.exchange import Fetch, RowExchange, plan_exchange
from lightsparse.context_parallel.key_owners import as_table, from_table
from lightsparse.context_parallel.shard import ContextShard


@dataclass(frozen=True, eq=False)
class Summaries:
    """Means of query blocks [B, Hkv, R, D] and key blocks [B, Hkv, C, D], at least fp32.

    query, key             for the columns before the row
    query_late, key_late   for the columns after it; None where they are the same or never read
    first, last            document of each column's first and last token, [B, C], or None
    first_row              column number of the first row
    """

    query: Tensor
    key: Tensor
    query_late: Tensor | None
    key_late: Tensor | None
    first: Tensor | None
    last: Tensor | None
    first_row: int


def summarise(
    q: Tensor, k: Tensor, ctx: SequenceContext, *, block: int, causal: bool, layer: int
) -> tuple[Summaries, dict[str, Tensor] | None]:
    """Summaries of q [B, H, Nq, D] and k [B, Hkv, Nkv, D], and what decoding has to keep (None without ctx.states).

    A query summary is the mean over the query heads of its group. With ctx.shard the means of all ranks' blocks are
    gathered: Summaries are those of the whole sequence on every rank. Raises ValueError when ctx.q_start > 0 and
    ctx.states does not hold what the tokens before left there, and for decoding without causality.
    """
    row = ctx.q_start // block
    documents = ctx.documents  # of the tokens here
    if ctx.shard is not None and documents is not None:
        documents = ctx.shard.take(documents)
    base = max(row - 1, 0) * block  # token at which the queries begin, once those kept from earlier are in front
    if ctx.q_start:
        q, key = _with_the_past(q, k, ctx, block=block, causal=causal, layer=layer)
    else:
        key = gather_block_means(block_means(k, block, documents, "last"), ctx.shard, block)
    first = None if ctx.documents is None else block_documents(ctx.documents, block, "first")
    last = None if ctx.documents is None else block_documents(ctx.documents, block, "last")

    def grouped(of: str) -> Tensor:
        of_queries = None if documents is None else documents[:, base:]
        means = block_means(q, block, of_queries, of).unflatten(1, (k.shape[1], -1)).mean(2)
        return gather_block_means(means, ctx.shard, block)

    query_late = key_late = None
    if causal:
        query = grouped("last")
        if row == 0:  # nothing comes before: row 0 reads itself only, its summary is never used
            query = F.pad(query, (0, 0, 1, 0))
        query = query[:, :, :-1]
    else:
        query = grouped("first")
        if documents is not None:
            query_late = grouped("last")
            key_late = gather_block_means(block_means(k, block, documents, "first"), ctx.shard, block)
    summaries = Summaries(query, key, query_late, key_late, first, last, row)
    if ctx.states is None:
        return summaries, None
    whole = k.shape[2] // block  # complete blocks: their summaries are final
    start = max(whole - 1, 0) * block - base
    return summaries, {"router_keys": key[:, :, :whole].detach(), "router_queries": q[:, :, start:].detach()}


@torch.compiler.disable
def gather_block_means(means_BHRD: Tensor, shard: ContextShard | None, block: int) -> Tensor:
    """The means of all blocks of the sequence, from those of each rank's own; differentiable."""
    if shard is None:
        return means_BHRD
    device = means_BHRD.device

    def planned() -> RowExchange:
        rank_of, token_row = (of[::block].to(device) for of in (shard.split.rank_of, shard.split.row_of))
        at = torch.arange(len(rank_of), device=device)
        return plan_exchange(rank_of, token_row // block, at, len(at), shard)

    plan = shard.plans.get(shard, ("block means", block, device), planned)
    gathered = Fetch(plan, as_table(means_BHRD, side_by_side=True), shard, "block means").result()
    return from_table(gathered, True, *means_BHRD.shape[:2])


def block_means(x_BHND: Tensor, block: int, documents: Tensor | None, of: str) -> Tensor:
    """Mean of each block over its tokens of one document: [B, H, ceil(N / block), D], at least fp32.

    of  "first" pools the tokens that share the document of the block's first token, "last" of its last token
    documents  int [B, N] or None (one document)
    """
    x_BHND = x_BHND.to(torch.promote_types(x_BHND.dtype, torch.float32))
    n = x_BHND.shape[2]
    missing = -n % block
    inside = F.pad(torch.ones(1, n, dtype=torch.bool, device=x_BHND.device), (0, missing)).unflatten(1, (-1, block))
    if documents is not None:
        ids = F.pad(documents, (0, missing)).unflatten(1, (-1, block))
        inside = inside & (ids == block_documents(documents, block, of)[..., None])
    weights = inside.to(x_BHND.dtype)
    weights = (weights / weights.sum(-1, keepdim=True)).expand(len(x_BHND), -1, -1)
    blocks = F.pad(x_BHND, (0, 0, 0, missing)).unflatten(2, (-1, block))
    return torch.einsum("bhrtd,brt->bhrd", blocks, weights)


def block_documents(documents: Tensor, block: int, of: str) -> Tensor:
    """Document of the first or last token of each block: [B, ceil(N / block)]."""
    at = torch.arange(0, documents.shape[1], block, device=documents.device)
    return documents[:, at if of == "first" else (at + block - 1).clamp(max=documents.shape[1] - 1)]


def _with_the_past(
    q: Tensor, k: Tensor, ctx: SequenceContext, *, block: int, causal: bool, layer: int
) -> tuple[Tensor, Tensor]:
    """Queries from the block before the first row on, and the summaries of all key blocks, while decoding."""
    if not causal:
        raise ValueError(f"ctx.q_start is {ctx.q_start}; decoding needs a causal model, use objective=causal")
    row, state = ctx.q_start // block, (ctx.states or {}).get(layer, {})
    kept = tuple(state[name].shape[2] if name in state else 0 for name in ("router_keys", "router_queries"))
    if kept != (row, ctx.q_start - max(row - 1, 0) * block):
        raise ValueError(
            f"ctx.q_start is {ctx.q_start} but ctx.states holds no router state of {ctx.q_start} tokens for layer "
            f"{layer}; decode with the states of the passes that read those tokens, one KVCache per layer"
        )
    documents = None if ctx.documents is None else ctx.documents[:, row * block :]
    new = block_means(k[:, :, row * block :], block, documents, "last")
    return torch.cat([state["router_queries"], q], 2), torch.cat([state["router_keys"], new], 2)
