"""Which parameter is treated how: decay groups, and Muon and AdamW as one optimizer.

Weight matrices decay; embeddings, norms and biases do not. Muon (Jordan et al. 2024; scaled as in Liu et al. 2025,
arXiv 2502.16982, section 2.2) orthogonalises the update of a matrix that maps hidden states to hidden states; it is not
meant for embeddings, the output head or vectors, which AdamW takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

HIDDEN = "hidden"  # 2-D weights inside the layers
OUTER = "outer"  # other weights of two dimensions or more, but no embeddings: the output head
FREE = "free"  # embeddings, norms, biases: no weight decay


def parameter_groups(model: nn.Module, layers: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters of `model` in at most three groups, for any torch.optim class; empty groups are left out.

    layers  the part of the model whose matrices count as hidden
    Each group has its `role`; the group FREE sets `weight_decay` to 0, the others leave it to the optimizer. A weight
    tied between an embedding and the head is an embedding.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    inside = {id(parameter) for parameter in layers.parameters()}
    members: dict[str, list[nn.Parameter]] = {HIDDEN: [], OUTER: [], FREE: []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            members[FREE].append(parameter)
        else:
            is_hidden = parameter.ndim == 2 and id(parameter) in inside
            members[HIDDEN if is_hidden else OUTER].append(parameter)
    return [
        {"params": parameters, "role": role} | ({"weight_decay": 0.0} if role == FREE else {})
        for role, parameters in members.items()
        if parameters
    ]


class ShardedMuon(Muon):
    """torch.optim.Muon, also on matrices of which each rank holds some rows (DTensor, FSDP2): the same update.

    Momentum stays sharded. A row's update depends on the whole matrix, so every rank gathers and orthogonalises each
    matrix in turn, as every replica would under DDP, and keeps its own rows.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            super().step()
            return loss
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                whole = _moved(update.full_tensor(), group)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None))
        return loss


def _moved(update: Tensor, group: dict[str, Any]) -> Tensor:
    """How far an update moves a whole matrix: a step of torch.optim.Muon from zero, without momentum and decay."""
    matrix = nn.Parameter(torch.zeros_like(update))
    matrix.grad = update
    same = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    Muon([matrix], weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()
    return matrix.detach()


class MuonAdamW(Optimizer):
    """torch.optim.Muon on the groups whose `role` is HIDDEN, torch.optim.AdamW on the others, as one optimizer.

    One optimizer, because Lightning counts a global step per optimizer step. Both parts work on this object's own
    param_groups and state, so schedules, state_dict and load_state_dict are those of any torch optimizer.

    lr            of the hidden matrices; the update is scaled to the RMS of an AdamW update ("match_rms_adamw"), so
                  that rates and decay tuned for AdamW carry over, whatever the matrix's shape
    adamw_lr      of everything else
    weight_decay  decoupled, of the hidden matrices and the head
    Raises ValueError for a value out of range, and when no group holds hidden matrices.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 3e-3,
        adamw_lr: float = 3e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        for name, rate in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay), ("eps", eps)):
            if rate < 0:
                raise ValueError(f"optimizer.{name} is {rate}; it must be at least 0")
        for name, share in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= share < 1:
                raise ValueError(f"optimizer.{name} is {share}; it must lie in [0, 1)")
        groups = [dict(group) for group in params]
        if not any(group.get("role") == HIDDEN for group in groups):
            raise ValueError("optimizer MuonAdamW finds no hidden matrices in this model; use optimizer=adamw")
        for group in groups:
            own = (
                {"lr": lr, "momentum": momentum}
                if group.get("role") == HIDDEN
                else {"lr": adamw_lr, "betas": betas, "eps": eps}
            )
            group.update({key: value for key, value in own.items() if key not in group})
        super().__init__(groups, {"weight_decay": weight_decay})
        self._share_groups_and_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also the last act of load_state_dict, which puts new lists and dicts into this object.
        super().__setstate__(state)
        self._share_groups_and_state()

    def _share_groups_and_state(self) -> None:
        hidden = [group for group in self.param_groups if group.get("role") == HIDDEN]
        others = [group for group in self.param_groups if group.get("role") != HIDDEN]
        self._parts: list[Optimizer] = [ShardedMuon(hidden, adjust_lr_fn="match_rms_adamw")]
        if others:
            self._parts.append(AdamW(others))
        for part in self._parts:  # each holds the very dicts of self.param_groups; defaults went in where missing
            part.state = self.state
