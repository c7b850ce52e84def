"""Lightning strategies over a grid of ranks, data × context: replicas (DDP) or shards (FSDP2) of the parameters.

Both average gradients over all ranks, those of a sequence included: the sum over its tokens is one over its ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightsparse.distributed.comm_hooks import gradient_hook
from lightsparse.distributed.launcher import RankLauncher
from lightsparse.distributed.mesh import RankGrid
from lightsparse.distributed.sharded_files import read, separated
from lightsparse.distributed.strategy_config import Replicas, SeveralRanks, StrategyConfig
from lightsparse.utils.compat.lightning import join_ranks
from lightsparse.utils.compat.torch import TORCHRUN_ATTEMPT, TORCHRUN_OWNS_STORE

_START = 300.0  # seconds that a rank waits at least for the others to appear; machines do not start at once


def strategy_for(config: StrategyConfig, ranks: int) -> Strategy | str:
    """The strategy of a run, as Lightning's Trainer takes it. Raises ValueError where the ranks do not fit the kind."""
    grid = RankGrid(ranks, config.context_ranks(ranks))
    if isinstance(config, Replicas):
        return ReplicatedStrategy(config, grid)
    return ShardedStrategy(config, grid) if isinstance(config, SeveralRanks) else "auto"


class GridStrategy(ParallelStrategy):
    """What both have in common: the grid, its context group, timeouts, and an end for all ranks at once."""

    grid: RankGrid
    timeout_s: float
    context_group: dist.ProcessGroup | None = None  # of this rank's sequence; None where one rank holds it
    handed: Mapping[str, str] = {}  # variables for the ranks that this one starts
    when_met: Callable[[dist.ProcessGroup | None], None] = staticmethod(lambda group: None)  # called once all have

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Who reads which samples: the ranks of a sequence read the same."""
        return {"num_replicas": self.grid.data, "rank": self.grid.data_rank(self.global_rank)}

    @cached_property
    def launcher(self) -> RankLauncher:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        here = len(self.parallel_devices)
        return RankLauncher(self.cluster_environment, here, self.grid.ranks // here, self.handed)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self.launcher.end_family(at_once=isinstance(exception, KeyboardInterrupt))

    def _start_timeout(self) -> timedelta:
        return timedelta(seconds=max(self.timeout_s, _START))

    def _meet(self) -> None:
        """Where torchrun has started the ranks again: join them in a part of its store that the first ones never saw.

        The agent keeps its store, and with it the addresses of ranks that are gone. With an agent on each of several
        machines and `--rdzv-backend=c10d`, attempts are counted apart: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the
        agents' environment gives every attempt a store of its own.
        """
        attempt = os.environ.get(TORCHRUN_ATTEMPT, "0")
        ranks = self.cluster_environment
        if attempt == "0" or os.environ.get(TORCHRUN_OWNS_STORE) != "True" or dist.is_initialized():
            return
        assert ranks is not None
        store = dist.TCPStore(ranks.main_address, ranks.main_port, is_master=False, timeout=self._start_timeout())
        dist.init_process_group(
            dist.get_default_backend_for_device(self.root_device),
            store=dist.PrefixStore(f"attempt-{attempt}", store),
            rank=ranks.global_rank(),
            world_size=ranks.world_size(),
            timeout=self._start_timeout(),
        )

    def _joined(self) -> None:
        """The ranks have met: from now on they wait for each other no longer than strategy.timeout."""
        timeout = timedelta(seconds=self.timeout_s)
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(timeout)
        if self.grid.context > 1:
            self.context_group = self.grid.context_group(timeout)


class ReplicatedStrategy(GridStrategy, DDPStrategy):
    """Every rank holds all parameters; gradients are averaged by DDP, whole or through a hook."""

    def __init__(self, config: Replicas, grid: RankGrid) -> None:
        self.grid, self.timeout_s = grid, config.timeout
        # Buffers are the same on all ranks, as they are made from the config and change nowhere.
        DDPStrategy.__init__(self, timeout=self._start_timeout(), forward_sync_buffers=False)
        self.hook = gradient_hook(config.comm_hook, **config.hook_options())  # (state, hook) or None

    def setup_distributed(self) -> None:
        self._meet()
        super().setup_distributed()
        self._joined()

    def setup_environment(self) -> None:
        super().setup_environment()
        self.when_met(None)  # over the usual group, as this rank has its device now

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.hook is not None:  # Lightning registers those it is given on CUDA only
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(*self.hook)

    def residuals(self, module: LightningModule) -> list[dict[str, Any]]:
        """What the hook owes the parameters on each rank, for a checkpoint; all ranks must call this, for rank 0."""
        assert self.hook is not None
        of_ranks: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(self.hook[0].residual_state(module.named_parameters()), of_ranks)
        return of_ranks or []

    def load_residuals(self, of_ranks: list[dict[str, Any]], module: LightningModule) -> None:
        """Take up what was owed, before the first step; other ranks than those of the checkpoint owe the mean each."""
        assert self.hook is not None
        if len(of_ranks) == self.world_size:
            mine = of_ranks[self.global_rank]
        else:
            names = {name for state in of_ranks for name in state["residuals"]}
            residuals = {
                name: sum(state["residuals"][name] for state in of_ranks if name in state["residuals"]) / len(of_ranks)
                for name in names
            }
            mine = {"steps": of_ranks[0]["steps"], "residuals": residuals}
        self.hook[0].load_residual_state(mine, module.named_parameters())


class ShardedStrategy(GridStrategy, ModelParallelStrategy):
    """Every rank holds a shard of each parameter, of its gradient and of its optimizer state (FSDP2).

    A checkpoint is a folder into which each rank writes its shards (sharded_files.py). Its content is that of every
    other strategy, so that any number of ranks under any strategy resumes from it, and this one from a plain file.
    Lightning's own would number the optimizer's state by another order of parameters than the optimizer's.
    """

    save_group: dist.ProcessGroup  # of all ranks, on the CPU, for writing beside training

    def __init__(self, config: SeveralRanks, grid: RankGrid) -> None:
        self.grid, self.timeout_s = grid, config.timeout
        ModelParallelStrategy.__init__(self, save_distributed_checkpoint=False, timeout=self._start_timeout())

    def setup_environment(self) -> None:
        self._meet()
        join_ranks(self)
        self._joined()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        assert isinstance(group, dist.ProcessGroup)  # of all ranks
        self.save_group = group
        self.when_met(group)

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        return self.grid.flat_mesh(self.root_device.type)

    def shard(self, module: LightningModule, parts: Iterable[nn.Module]) -> None:
        """Shard the parameters of each part, and the rest as one; to be called in configure_model, once."""
        if isinstance(module, FSDPModule):
            return
        for part in parts:
            fully_shard(part, mesh=self.device_mesh)
        fully_shard(module, mesh=self.device_mesh)
        for method in ("training_step", "validation_step"):  # Lightning calls these and not forward
            register_fsdp_forward_method(module, method)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return inner.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """All ranks call this. storage_options goes to the writer, as in every strategy."""
        rest, shards = separated(checkpoint, self._owner_of(checkpoint))
        writer: Any = self.checkpoint_io  # training's own, which alone can write shards
        writer.save_shards(rest, shards, Path(filepath), self.save_group, self.is_global_zero, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        if Path(checkpoint_path).is_dir():
            return read(Path(checkpoint_path), self.lightning_module.state_dict())
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        shards = {name: _shard_like(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            of_number = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _shard_like(of_number[number], value) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _owner_of(self, checkpoint: Mapping[str, Any]) -> Callable[[tuple[Any, ...]], str | None]:
        """Which parameter a tensor of a checkpoint belongs to, by its path of keys."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        of_number: list[dict[int, str]] = []  # for each optimizer
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            of_number.append({n: names[id(p)] for n, p in zip(numbers, parameters, strict=True)})

        def owner(path: tuple[Any, ...]) -> str | None:
            if path[0] == "state_dict":
                return path[1]
            if path[0] == "optimizer_states" and path[2] == "state":
                return of_number[path[1]].get(path[3])
            return None

        return owner

    def gathered_weights(self) -> dict[str, Any]:
        """The module's state with whole tensors, on the CPU of rank 0; of no use on the others. All ranks call this."""
        assert self.lightning_module is not None

        def whole(shard: DTensor) -> Tensor:
            tensor = shard.full_tensor()  # a collective: on every rank, in the same order
            return tensor.cpu() if self.is_global_zero else tensor.new_empty(0)

        held = self.lightning_module.state_dict()
        return {name: whole(value) if isinstance(value, DTensor) else value for name, value in held.items()}


def _shard_like(own: Any, value: Any) -> Any:
    """This rank's shard of a whole tensor, where its own one is sharded and has the same shape; else the value."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    if isinstance(value, DTensor):  # of a folder: read as a shard
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
