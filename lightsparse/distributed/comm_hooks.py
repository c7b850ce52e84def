"""Gradient exchange under DDP with fewer bytes: hooks by name, for `DistributedDataParallel.register_comm_hook`.

bf16      the gradients rounded to bf16 and summed so: half the bytes of fp32
powersgd  PyTorch's PowerSGD (Vogels et al. 2019, arXiv 1905.13727): each matrix as a product of low rank
topk      the largest entries of each parameter's gradient, the rest remembered for the next step: error feedback
          (Stich et al. 2018, arXiv 1809.07599, algorithm 1; Lin et al. 2017, arXiv 1712.01887, without its momentum
          correction)

Every hook leaves the mean over the ranks, as DDP does without one, and counts what this rank sends. The count follows
the ring algorithms: an all-reduce of n bytes over R ranks sends 2 (R − 1) / R · n, an all-gather of n bytes from each
rank sends (R − 1) · n.
"""

# Annotations are not postponed here: DDP compares those of a hook with the classes they name.
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future

HookName = Literal["none", "bf16", "powersgd", "topk"]
NamedParameters = Iterable[tuple[str, Tensor]]


class HookState:
    """What a hook keeps on one rank.

    group  the ranks of the DDP module; None is all of them
    sent   bytes sent to other ranks since the start
    steps  steps finished, those before a resumed checkpoint included
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.sent = self.steps = 0

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def count(self, bucket: dist.GradBucket, size: int) -> None:
        """Add the bytes that one bucket has cost; DDP hands in a step's buckets one by one, the last one marked."""
        self.sent += size
        self.steps += bucket.is_last()

    def all_reduced(self, size: int) -> int:
        """Bytes this rank sends when `size` bytes are all-reduced; rounded down where R does not divide them."""
        return 2 * (self.ranks - 1) * size // self.ranks

    def residual_state(self, parameters: NamedParameters) -> dict[str, Any]:
        """What a checkpoint must hold of this rank: {"steps": int, "residuals": {name: flat tensor}}.

        parameters  `named_parameters()` of the module inside DDP

        Residuals differ between ranks. For another number of ranks give each the mean over the old ranks: what is
        owed to the parameters stays the same.
        """
        kept = self._residuals()
        return {
            "steps": self.steps,
            "residuals": {name: kept[p].cpu().clone() for name, p in parameters if p in kept},
        }

    def load_residual_state(self, state: dict[str, Any], parameters: NamedParameters) -> None:
        """Continue from `residual_state`, before the first step. Raises ValueError when it is of other parameters."""
        known = dict(parameters)
        residuals = {}
        for name, saved in state["residuals"].items():
            if name not in known or known[name].numel() != saved.numel():
                own = f"{known[name].numel()} entries" if name in known else "no such parameter"
                raise ValueError(
                    f"the checkpoint holds a gradient residual of {saved.numel()} entries for {name}, and the model "
                    f"has {own}; resume with the model that was saved, or start a new run"
                )
            residuals[known[name]] = saved.to(known[name].device)
        self._restore(residuals)
        self.steps = state["steps"]

    def forget_non_finite(self) -> None:
        """After a skipped step: what is kept for later ones must be finite."""

    def _residuals(self) -> dict[Tensor, Tensor]:
        return {}

    def _restore(self, residuals: dict[Tensor, Tensor]) -> None:
        if residuals:
            raise ValueError(
                "the checkpoint holds gradient residuals, which this strategy.comm_hook does not use; resume with the "
                "hook of the run that wrote it (topk or powersgd)"
            )


Hook = Callable[[Any, dist.GradBucket], Future[Tensor]]


def gradient_hook(
    name: HookName,
    *,
    topk_share: float = 0.01,
    powersgd_rank: int = 4,
    powersgd_start: int = 100,
    group: dist.ProcessGroup | None = None,
) -> tuple[HookState, Hook] | None:
    """(state, hook) for `ddp.register_comm_hook(state, hook)`; None for "none". Needs no process group yet.

    topk_share      share of each parameter's gradient entries that a step sends, in (0, 1]; at least one entry
    powersgd_rank   rank of the approximation of each matrix; 1 to 4 is usual
    powersgd_start  steps that are averaged in full before the first approximated one; DDP composes its buckets anew
                    after the first step, so at least 2

    Lightning's DDPStrategy takes both as ddp_comm_state and ddp_comm_hook, but registers them on CUDA only: on a CPU
    register them on the wrapped module. Raises ValueError for another name and values outside these ranges.
    """
    if name not in get_args(HookName):
        raise ValueError(f"strategy.comm_hook is {name!r}; it must be one of {', '.join(get_args(HookName))}")
    if not 0 < topk_share <= 1:
        raise ValueError(
            f"strategy.topk_share is {topk_share}; it is the share of gradient entries to send, above 0 and at most 1"
        )
    if powersgd_rank < 1:
        raise ValueError(
            f"strategy.powersgd_rank is {powersgd_rank}; it is the rank of a matrix's approximation, at least 1"
        )
    if powersgd_start < 2:
        raise ValueError(
            f"strategy.powersgd_start is {powersgd_start}; DDP arranges its buckets in the first two steps, so it must "
            "be at least 2"
        )
    if name == "bf16":
        return HookState(group), _bf16
    if name == "powersgd":
        return PowerSGD(powersgd_rank, powersgd_start, group), _powersgd
    if name == "topk":
        return TopK(topk_share, group), _topk
    return None


def _bf16(state: HookState, bucket: dist.GradBucket) -> Future[Tensor]:
    # DDP refuses PyTorch's hook by its name where there is no NCCL; gloo adds up bf16 just as well.
    state.count(bucket, state.all_reduced(torch.bfloat16.itemsize * bucket.buffer().numel()))
    return bf16_compress_hook(state.group, bucket)  # type: ignore[arg-type]


class PowerSGD(HookState):
    """PyTorch's state, and what it lacks: bytes, and residuals by parameter instead of by bucket.

    A resumed run keeps its residuals, but is not the same bit for bit: DDP composes its buckets anew, so its first two
    steps are averaged in full, and the factors that PowerSGD starts from are drawn again.
    """

    def __init__(self, rank: int, start: int, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        # A column of zeros (a layer without a gradient) would be divided by its norm.
        self.inner = PowerSGDState(
            group, matrix_approximation_rank=rank, start_powerSGD_iter=start, orthogonalization_epsilon=1e-8
        )
        self.start = start
        self._places: dict[int, list[tuple[Tensor, slice]]] = {}  # of the parameters in each approximated bucket
        self._waiting: dict[Tensor, Tensor] = {}  # residuals of a checkpoint, until their bucket is approximated

    def _residuals(self) -> dict[Tensor, Tensor]:
        kept = dict(self._waiting)
        for bucket, error in self.inner.error_dict.items():
            kept.update({p: error[place] for p, place in self._places[bucket]})
        return kept

    def forget_non_finite(self) -> None:
        for error in self.inner.error_dict.values():
            error.nan_to_num_(0.0, 0.0, 0.0)
        self.inner.p_memory_dict.clear()  # the factors it would start from; drawn again
        self.inner.q_memory_dict.clear()

    def load_residual_state(self, state: dict[str, Any], parameters: NamedParameters) -> None:
        super().load_residual_state(state, parameters)
        self.inner.start_powerSGD_iter = max(2, self.start - self.steps)

    def _restore(self, residuals: dict[Tensor, Tensor]) -> None:
        self._waiting = residuals


def _powersgd(state: PowerSGD, bucket: dist.GradBucket) -> Future[Tensor]:
    inner, index, buffer = state.inner, bucket.index(), bucket.buffer()
    inner.process_group = state.group
    approximated = inner.iter >= inner.start_powerSGD_iter
    if approximated and index not in inner.error_dict:
        state._places[index] = list(_places(bucket))
        inner.error_dict[index] = torch.zeros_like(buffer)
        for p, place in state._places[index]:
            if p in state._waiting:
                inner.error_dict[index][place] = state._waiting.pop(p)
    before = inner.total_numel_after_compression
    future = powerSGD_hook(inner, bucket)
    entries = inner.total_numel_after_compression - before if approximated else buffer.numel()
    state.count(bucket, state.all_reduced(entries * buffer.element_size()))
    if "nccl" not in dist.get_backend(state.group):
        # The hook's later all-reduces start in callbacks. NCCL runs these at once, in order; gloo runs them when an
        # earlier one is done, in another order on each rank, and hangs or aborts with two buckets under way.
        future.wait()
    return future


class TopK(HookState):
    """Residual of each parameter, flat, as its bucket holds it; fp32 where gradients are shorter, so that small
    entries add up and what rounding takes from a sent one is sent later.

    The share is taken of each parameter and not of each bucket, so that the result does not depend on how DDP composes
    its buckets: it changes that after the first step, of a resumed run, too.
    """

    def __init__(self, share: float, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        self.share = share
        self.residuals: dict[Tensor, Tensor] = {}

    def _residuals(self) -> dict[Tensor, Tensor]:
        return self.residuals

    def _restore(self, residuals: dict[Tensor, Tensor]) -> None:
        self.residuals = residuals


def _topk(state: TopK, bucket: dist.GradBucket) -> Future[Tensor]:
    buffer, ranks = bucket.buffer(), state.ranks
    if buffer.numel() > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"a bucket holds {buffer.numel()} gradient entries, more than the 32-bit indices of "
            "strategy.comm_hook=topk can name; use strategy.comm_hook=bf16 or powersgd"
        )
    values, indices = [], []
    for p, place in _places(bucket):
        gradient = buffer[place]
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if p in state.residuals:
            total = total + state.residuals[p]
        chosen = largest(total, max(1, round(state.share * total.numel())))
        sent = total[chosen].to(buffer.dtype)
        rest = total.index_add(0, chosen, -sent.to(total.dtype))
        # What is not finite has been sent, for every rank to see, and must not come back in later steps.
        state.residuals[p] = rest.nan_to_num_(0.0, 0.0, 0.0)
        values.append(sent)
        indices.append((chosen + place.start).to(torch.int32))
    # One message for both, as bytes.
    message = torch.cat([torch.cat(values).view(torch.uint8), torch.cat(indices).view(torch.uint8)])
    cut = sum(map(len, values)) * buffer.element_size()
    state.count(bucket, (ranks - 1) * len(message))
    received = message.new_empty(ranks * len(message))
    work = dist.all_gather_single(received, message, group=state.group, async_op=True)

    def mean(_: Future) -> Tensor:
        buffer.zero_()
        for part in received.view(ranks, -1):  # in order of ranks: every rank adds up to the same bits
            # A view of another dtype must start on a multiple of its size; a copy does.
            theirs, at = part[:cut].clone().view(buffer.dtype), part[cut:].clone().view(torch.int32)
            buffer.index_add_(0, at, theirs)
        return buffer.div_(ranks)

    return work.get_future().then(mean)


def largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` entries of x [n] largest in magnitude: int64 [count]. Ties go to the lower index, and
    NaN comes first, so that the count holds and every rank sees it."""
    size = x.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = torch.topk(size, count, sorted=False).values.amin()
    above = (size > least).nonzero().flatten()
    return torch.cat([above, (size == least).nonzero().flatten()[: count - len(above)]])


def _places(bucket: dist.GradBucket) -> Iterable[tuple[Tensor, slice]]:
    """Each parameter of a bucket, and where the flat buffer holds its gradient."""
    start = bucket.buffer().storage_offset()
    for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        first = gradient.storage_offset() - start
        yield p, slice(first, first + gradient.numel())
