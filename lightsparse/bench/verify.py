"""Is the result right? Asked before anything is timed, against PyTorch's dense attention in fp64 under the same mask.

Brute force over all rows is quadratic, so at the measured size the output gradient is non-zero in sampled rows only:
then outputs of those rows and the gradients of all keys and values follow from those rows alone, exactly.
Suffixes: B batch, H query heads, R sampled rows, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockLayout

_CPU = torch.device("cpu")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, H, N, D], k, v [B, Hkv, N, D] → [B, H, N, D]

# A kernel may err as much as dense attention does in its dtype, twice, plus this much relative to the result: room for
# the rounding of single scores where few keys are read.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def ours(layout: BlockLayout, backend: str) -> Attend:
    """Our kernel over `layout`: backend blocked or native, or flex on CUDA."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, backend=backend)

    return attend


class VerificationError(RuntimeError):
    """A kernel's result differs from the trusted one: its time would mean nothing."""


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, Hkv, N, D]
    v: Tensor  # [B, Hkv, N, D]
    grad: Tensor  # [B, H, N, D], gradient of the output


def inputs(
    seq: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device = _CPU
) -> Inputs:
    """Normal numbers, batch 1, the same on every call and device."""
    generator = torch.Generator().manual_seed(0)

    def normal(of_heads: int) -> Tensor:
        return torch.randn(1, of_heads, seq, head_dim, generator=generator).to(device, dtype)

    q, k, v, grad = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def sampled_rows(seq: int, block: int, count: int = 16) -> Tensor:
    """Rows to check: the first and last, both sides of a block border, and others drawn at random. int64, ascending."""
    drawn = torch.randint(seq, (count,), generator=torch.Generator().manual_seed(1))
    border = block * (seq // block // 2)
    chosen = torch.cat([drawn, torch.tensor([0, border - 1, border, seq - 1])])
    return chosen.clamp(0, seq - 1).unique()


def check(attend: Attend, given: Inputs, layout: BlockLayout, rows: Tensor, what: str, *, backward: bool) -> float:
    """The largest relative error of the output (and of the q, k, v gradients) over `rows`.

    Raises VerificationError, naming the tensor, when it exceeds twice the error of dense attention in the same dtype
    under the same matmul precision (plus FLOOR).
    """
    rows = rows.to(given.q.device)
    mask = allowed(layout, rows)
    exact = _over_rows(given, mask, rows, torch.float64, backward)
    dense = _over_rows(given, mask, rows, given.q.dtype, backward)
    found = _of_kernel(attend, given, rows, backward)
    largest = 0.0
    for name in exact:
        error, dense_error = (_relative_error(result[name], exact[name]) for result in (found, dense))
        limit = 2 * dense_error + FLOOR[given.q.dtype]
        if not error <= limit:  # NaN fails too
            raise VerificationError(
                f"{what}, {given.q.dtype}, is wrong: relative error {error:.2g} in {name}, rounding gives at most "
                f"{limit:.2g}; it was not timed"
            )
        largest = max(largest, error)
    return largest


def allowed(layout: BlockLayout, rows: Tensor) -> Tensor:
    """Bool [B|1, H|Hkv|1, R, N]: which keys the queries `rows` read, by the layout's definition and nothing else."""
    device, block_row = rows.device, rows // layout.q_block
    table = layout.kv_indices[:, :, block_row].long()
    chosen = torch.zeros(*table.shape[:3], layout.num_kv_blocks + 1, dtype=torch.bool, device=device)
    chosen.scatter_(3, torch.where(table < 0, layout.num_kv_blocks, table), True)
    chosen[:, :, torch.isin(block_row, layout.dense_rows.long())] = True
    keys = torch.arange(layout.num_keys, device=device)
    of_batch = torch.arange(max(layout.mask.q_pos.shape[0], len(table)), device=device)[:, None, None, None]
    in_interval = layout.mask(of_batch, torch.tensor(0, device=device), rows[:, None], keys)
    return chosen[..., keys // layout.kv_block] & in_interval


def _over_rows(given: Inputs, mask: Tensor, rows: Tensor, dtype: torch.dtype, backward: bool) -> dict[str, Tensor]:
    """Dense attention of the queries `rows` in `dtype`, and the gradients when only those rows' outputs have one."""
    q_BHRD = given.q.detach()[:, :, rows].to(dtype).requires_grad_()
    k_BHND, v_BHND = (t.detach().to(dtype).requires_grad_() for t in (given.k, given.v))
    heads = q_BHRD.shape[1]
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    out_BHRD = F.scaled_dot_product_attention(q_BHRD, k_BHND, v_BHND, attn_mask=mask, enable_gqa=True)
    if not backward:
        return {"the output": out_BHRD.detach()}
    grads = torch.autograd.grad(out_BHRD, (q_BHRD, k_BHND, v_BHND), given.grad[:, :, rows].to(dtype))
    return {"the output": out_BHRD.detach(), **dict(zip(_GRADIENTS, grads, strict=True))}


def _of_kernel(attend: Attend, given: Inputs, rows: Tensor, backward: bool) -> dict[str, Tensor]:
    if not backward:
        with torch.no_grad():
            return {"the output": attend(given.q, given.k, given.v)[:, :, rows]}
    out = attend(given.q, given.k, given.v)
    grad = torch.zeros_like(given.grad)
    grad[:, :, rows] = given.grad[:, :, rows]
    dq, dk, dv = torch.autograd.grad(out, (given.q, given.k, given.v), grad)
    return {"the output": out.detach()[:, :, rows], **dict(zip(_GRADIENTS, (dq[:, :, rows], dk, dv), strict=True))}


_GRADIENTS = ("the gradient of q", "the gradient of k", "the gradient of v")


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
