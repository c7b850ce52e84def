"""Rows of a table that is spread over ranks: each rank fetches the ones it wants, once; gradients return the same way.

Every rank holds a table [rows, width] of its own. A RowExchange is planned together by all ranks of a group: each says
which rows of whom it wants; one all_to_all then moves them, another one moves the gradients back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.context_parallel.shard import ContextShard
from lightsparse.utils.rank_errors import ranks_named

_AT_ONCE = 4096  # rows copied at a time: a rank's own rows are most of what it wants, and no second copy need exist


@dataclass(frozen=True, eq=False)
class RowExchange:
    """What one rank gives and takes. `at` names places in the result, which has `size` rows; the others stay 0."""

    size: int
    own_rows: Tensor  # rows of its own table that it wants itself
    own_at: Tensor
    send_rows: Tensor  # rows of its own table, receiver by receiver
    send_counts: list[int]  # of each rank
    received_at: Tensor  # sender by sender
    receive_counts: list[int]


def plan_exchange(rank_of: Tensor, row_of: Tensor, at: Tensor, size: int, shard: ContextShard) -> RowExchange:
    """Plan, together with all ranks of the group, to have row row_of[i] of rank rank_of[i] at place at[i].

    int64 [M] each, a pair (rank, row) at most once. Requests travel as runs of neighbouring rows.
    """
    device, world = rank_of.device, shard.world
    by_rank = torch.argsort(rank_of, stable=True)
    counts = torch.bincount(rank_of, minlength=world).tolist()
    rows, places = row_of[by_rank].split(counts), at[by_rank].split(counts)
    me = shard.rank
    others = [rank for rank in range(world) if rank != me]
    wanted = [_runs(rows[rank]) if rank != me else row_of.new_empty(0, 2) for rank in range(world)]

    number = torch.tensor([len(runs) for runs in wanted], device=device)
    asked = torch.empty_like(number)
    _transfer(number, asked, [1] * world, [1] * world, shard, "requests")
    asked_counts, wanted_counts = asked.tolist(), number.tolist()
    requests = row_of.new_empty(sum(asked_counts), 2)
    _transfer(torch.cat(wanted), requests, wanted_counts, asked_counts, shard, "requests")
    send = [_expanded(runs) for runs in requests.split(asked_counts)]
    return RowExchange(
        size,
        own_rows=rows[me],
        own_at=places[me],
        send_rows=torch.cat(send),
        send_counts=[len(of_rank) for of_rank in send],
        received_at=torch.cat([places[rank] for rank in others]) if others else at[:0],
        receive_counts=[0 if rank == me else counts[rank] for rank in range(world)],
    )


class Fetch:
    """One use of an exchange: it starts at once, `result` waits. Between the two there is time to compute.

    table  [rows, width] of this rank; what  the traffic's name
    The backward is as lazy: gradients leave as soon as they are there and are waited for at the end.
    """

    def __init__(self, exchange: RowExchange, table: Tensor, shard: ContextShard, what: str):
        self.exchange, self.table, self.shard, self.what = exchange, table, shard, what
        self.work: dist.Work
        self.grad_work: dist.Work
        self.returned: Tensor  # gradients of the rows that were sent
        self.grad_table: Tensor  # the table's gradient: first of its own use, with what has returned in the end
        self.received = _Send.apply(table, self)

    def result(self) -> Tensor:
        """[size, width], differentiable in the table of every rank. To be called once."""
        table, received = self.table, self.received
        del self.table, self.received  # both know this object through autograd: a circle would keep every step's rows
        result = _Receive.apply(table, received, self)
        del self.work
        return result


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, fetch: Fetch) -> Tensor:
        plan = fetch.exchange
        send = table.index_select(0, plan.send_rows)
        received = table.new_empty(sum(plan.receive_counts), table.shape[1])
        fetch.work = _transfer(
            send, received, plan.send_counts, plan.receive_counts, fetch.shard, fetch.what, wait=False
        )
        ctx.fetch = fetch
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        fetch = ctx.fetch
        _wait(fetch.grad_work, fetch.shard)
        grad_table = fetch.grad_table
        grad_table.index_add_(0, fetch.exchange.send_rows, fetch.returned)
        del fetch.grad_table, fetch.returned, fetch.grad_work
        return grad_table, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, received: Tensor, fetch: Fetch) -> Tensor:
        plan = fetch.exchange
        _wait(fetch.work, fetch.shard)
        result = table.new_zeros(plan.size, table.shape[1])
        for rows, at in zip(plan.own_rows.split(_AT_ONCE), plan.own_at.split(_AT_ONCE), strict=True):
            result.index_copy_(0, at, table.index_select(0, rows))
        result.index_copy_(0, plan.received_at, received)
        ctx.fetch, ctx.rows = fetch, len(table)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        fetch, plan = ctx.fetch, ctx.fetch.exchange
        back = grad.index_select(0, plan.received_at)
        fetch.returned = grad.new_empty(sum(plan.send_counts), grad.shape[1])
        fetch.grad_work = _transfer(
            back,
            fetch.returned,
            plan.receive_counts,
            plan.send_counts,
            fetch.shard,
            fetch.what.removesuffix("s") + " gradients",
            wait=False,
        )
        fetch.grad_table = grad.new_zeros(ctx.rows, grad.shape[1])
        for rows, at in zip(plan.own_rows.split(_AT_ONCE), plan.own_at.split(_AT_ONCE), strict=True):
            fetch.grad_table.index_add_(0, rows, grad.index_select(0, at))
        return None, back, None  # `back` only has the shape of a gradient: _Send has the true one, of all rows at once


def _transfer(
    send: Tensor,
    received: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    shard: ContextShard,
    what: str,
    wait: bool = True,
) -> dist.Work:
    """all_to_all of rows, counted. As bytes, because gloo does not know every dtype."""
    shard.traffic.add(what, sum(n for rank, n in enumerate(send_counts) if rank != shard.rank) * _row_bytes(send))
    with ranks_named(shard.timeout):
        work = dist.all_to_all_single(
            _as_bytes(received), _as_bytes(send), receive_counts, send_counts, group=shard.group, async_op=True
        )
    if wait:
        _wait(work, shard)
    return work


def _wait(work: dist.Work, shard: ContextShard) -> None:
    with ranks_named(shard.timeout):
        work.wait()


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * (x.shape[1] if x.dim() > 1 else 1)


def _as_bytes(x: Tensor) -> Tensor:
    """The same memory as [rows, bytes of a row]."""
    return x.contiguous().view(len(x), -1 if x.numel() else _row_bytes(x) // x.element_size()).view(torch.uint8)


def _runs(rows: Tensor) -> Tensor:
    """Rows [n] as runs of neighbours, (first, length): int64 [runs, 2]."""
    if not len(rows):
        return rows.new_empty(0, 2)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1] + 1
    at = begins.nonzero().flatten()
    return torch.stack([rows[at], torch.diff(at, append=at.new_tensor([len(rows)]))], 1)


def _expanded(runs: Tensor) -> Tensor:
    """The rows of some runs, in order."""
    first, length = runs[:, 0], runs[:, 1]
    before = length.cumsum(0) - length
    return (first - before).repeat_interleave(length) + torch.arange(int(length.sum()), device=runs.device)
