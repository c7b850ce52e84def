"""The typed schema of conf/config.yaml: every key, its type, its unit, its rule.

The schema of a group lives with the code it configures (attention cores, ModelConfig, the DataConfigs, schedules); this
file adds what belongs to the run as a whole, whose defaults stand in conf/config.yaml alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightsparse.config.build import AttentionChoice, ClassChoice
from lightsparse.config.eval_plan import TrainingTasks
from lightsparse.data import DataConfig, TokenizerConfig
from lightsparse.distributed.mesh import RankGrid
from lightsparse.distributed.strategy_config import Replicas, StrategyConfig
from lightsparse.models.transformer import ModelConfig
from lightsparse.optim.schedules import Schedule


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int  # optimizer steps
    max_time: float | None  # seconds that this start may take; null = no limit
    accumulate_grad_batches: int | None  # micro-batches per optimizer step; null = what global_batch takes, or 1
    global_batch: int | None  # samples per optimizer step, over all ranks; null = as batch_size and accumulate give
    grad_clip: float | None  # largest norm of the gradient; null = off
    devices: int  # ranks on each machine, those of torchrun or SLURM where they started them
    num_nodes: int  # machines, likewise
    progress: bool  # the progress bar
    log_every_n_steps: int  # optimizer steps between rows of metrics.csv
    selector_only_steps: int  # optimizer steps at the start that train only what selects; −1 = all of them

    def __post_init__(self) -> None:
        counts = ("max_steps", "accumulate_grad_batches", "global_batch", "devices", "num_nodes", "log_every_n_steps")
        for name in counts:
            _at_least(1, f"trainer.{name}", getattr(self, name))
        if self.selector_only_steps < -1:
            raise ValueError(
                f"trainer.selector_only_steps is {self.selector_only_steps}; it counts optimizer steps, 0 or more, "
                "and -1 is the whole run"
            )
        if self.accumulate_grad_batches is not None and self.global_batch is not None:
            raise ValueError(
                f"trainer.global_batch is {self.global_batch} and trainer.accumulate_grad_batches "
                f"{self.accumulate_grad_batches}, which follows from it; leave one of them out"
            )
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"trainer.max_time is {self.max_time:g}; it counts seconds and must be above 0")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"trainer.grad_clip is {self.grad_clip}; a norm is above 0, and null is no clipping")

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.devices * self.num_nodes

    def trains_only_selection(self, step: int) -> bool:
        """Whether the optimizer step after `step` finished ones leaves all but the selection as it is."""
        return self.selector_only_steps < 0 or step < self.selector_only_steps


@dataclass(frozen=True)
class CheckpointConfig:
    every_n_steps: int  # optimizer steps
    keep: int  # newest checkpoints that stay on disk
    keep_best: bool  # the one with the lowest validation loss stays, too
    background: bool  # written beside training, from a copy of the state in main memory
    timeout: float  # seconds that the end of a run waits for the one under way

    def __post_init__(self) -> None:
        _at_least(1, "checkpoint.every_n_steps", self.every_n_steps)
        _at_least(1, "checkpoint.keep", self.keep)
        if not self.timeout > 0:
            raise ValueError(f"checkpoint.timeout is {self.timeout:g}; it counts seconds and must be above 0")


@dataclass(frozen=True)
class HealthConfig:
    skip_steps: int  # steps in a row that are not taken as they would do harm; one more ends the run
    spike: float | None  # a loss above so many times the mean of the last spike_window steps does harm; null = off
    spike_window: int  # optimizer steps

    def __post_init__(self) -> None:
        _at_least(0, "health.skip_steps", self.skip_steps)
        _at_least(1, "health.spike_window", self.spike_window)
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"health.spike is {self.spike:g}; it is a multiple of the usual loss and must be above 1")


@dataclass(frozen=True)
class EvalConfig:
    every_n_steps: int  # optimizer steps
    tokens: int  # validation tokens, in hash order of the documents; of a task tokens // context examples
    stop_accuracy: float | None  # share of right answers at which training ends; null = at trainer.max_steps
    sample_tokens: int  # tokens of sample.txt; 0 = no sample
    tasks: TrainingTasks  # long-range tasks during the training

    def __post_init__(self) -> None:
        _at_least(1, "eval.every_n_steps", self.every_n_steps)
        _at_least(1, "eval.tokens", self.tokens)
        _at_least(0, "eval.sample_tokens", self.sample_tokens)
        if self.stop_accuracy is not None and not 0.0 < self.stop_accuracy <= 1.0:
            raise ValueError(f"eval.stop_accuracy is {self.stop_accuracy}; it is a share and must lie in (0, 1]")


@dataclass(frozen=True)
class KernelsConfig:
    backend: Literal[
        "auto", "native", "blocked", "per_query", "reference", "flex", "triton", "sdpa"
    ]  # of attention; see kernels/dispatch.py
    flash: Literal["auto", "fa3", "fa4", "none"]  # of dense attention on CUDA; see kernels/flash.py
    flex_backend: Literal["auto", "triton", "flash"]  # of FlexAttention on CUDA; see kernels/flex.py


@dataclass(frozen=True)
class Config:
    """One run. `lightsparse.config.parse.parse` makes it from the composed YAML."""

    name: str  # directory below runs_dir
    doctor: bool  # look into the run instead of training; see training/preflight/doctor.py
    seed: int
    resume: Literal["auto", "must", "never"]
    precision: Literal["32", "bf16-mixed", "bf16-true"]
    init_from: str | None  # folder of a transformers model to start from; see training/init_from.py
    compile: bool
    objective: Literal["causal", "mlm"]
    mlm_ratio: float  # share of tokens that are masked; read by objective=mlm only
    runs_dir: str
    matmul_precision: Literal["highest", "high", "medium"]  # torch.set_float32_matmul_precision
    threads: int | None  # per process; null = torch's choice
    allow_targets: tuple[str, ...]
    kernels: KernelsConfig
    attention: AttentionChoice
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig  # that of text holds the tokenizer, too
    strategy: StrategyConfig
    optimizer: ClassChoice
    schedule: Schedule
    logger: dict[str, Any]  # name → node of a Lightning logger, or null
    callbacks: dict[str, Any]  # name → node of a Lightning callback, or null
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    eval: EvalConfig
    # What it was made from, plain values; no key itself. The run directory, checkpoints and loggers keep it.
    composed: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={"key": False})

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.,=+-]*", self.name):
            raise ValueError(f"name is {self.name}; it names one directory: letters, digits and . , = + - _")
        if len(self.name.encode()) > 255:
            raise ValueError(f"name has {len(self.name.encode())} bytes; a directory's name takes at most 255")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2³²)")
        if not 0.0 < self.mlm_ratio < 1.0:
            raise ValueError(f"mlm_ratio is {self.mlm_ratio}; it is a share of tokens and must lie in (0, 1)")
        _at_least(1, "threads", self.threads)
        if self.compile and self.model.activation_checkpointing == "offload":
            raise ValueError(
                "compile is true and model.activation_checkpointing is offload, which moves tensors between layers, "
                "where a compiled model has no border; use model.activation_checkpointing=true or compile=false"
            )
        if self.data.has_answers and self.objective == "mlm":
            raise ValueError("objective is mlm, but the data is a task whose answers follow; use objective=causal")
        if self.eval.stop_accuracy is not None and not self.data.has_answers:
            raise ValueError(
                f"eval.stop_accuracy is {self.eval.stop_accuracy}, but the data asks nothing that could be right; "
                "use it with a task, such as data=mqar"
            )
        if self.eval.tasks.names and self.strategy.sharded:
            raise ValueError(
                f"eval.tasks.names is {list(self.eval.tasks.names)}, which no rank can answer under "
                f"strategy={self.strategy.kind}, where each holds a part of the model; use "
                "lightsparse evaluate run=… afterwards"
            )
        if self.eval.tasks.names and self.objective == "mlm":
            raise ValueError("eval.tasks.names is given and objective is mlm; tasks are answered by objective=causal")
        whole, micro = self.trainer.global_batch, self.data.batch_size * self.grid.data  # raises where ranks do not fit
        if whole is not None and whole % micro:
            raise ValueError(
                f"trainer.global_batch is {whole}, no multiple of data.batch_size={self.data.batch_size} times the "
                f"{self.grid.data} ranks that read different samples; change one of them"
            )
        if isinstance(self.strategy, Replicas) and self.strategy.comm_hook == "bf16" and self.precision == "bf16-true":
            raise ValueError(
                "strategy.comm_hook is bf16 and precision is bf16-true, whose gradients are bf16 already; "
                "use strategy.comm_hook=none"
            )
        hook = self.strategy.comm_hook if isinstance(self.strategy, Replicas) else "none"
        if self.trainer.selector_only_steps and hook in ("topk", "powersgd"):
            raise ValueError(
                f"trainer.selector_only_steps is {self.trainer.selector_only_steps} and strategy.comm_hook is "
                f"{hook}, which would hand on the gradients of those steps later; use strategy.comm_hook=bf16 or none"
            )

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.trainer.ranks

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of a rank per optimizer step."""
        return self.samples_per_step // (self.data.batch_size * self.grid.data)

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return samples_per_step(self.trainer, self.strategy, self.data.batch_size)

    @property
    def grid(self) -> RankGrid:
        """Who reads which samples, and who shares a sequence."""
        return self.strategy.grid(self.ranks)


def samples_per_step(trainer: TrainerConfig, strategy: StrategyConfig, batch_size: int) -> int:
    """Samples per optimizer step, over all ranks; batch_size counts those of a micro-batch and rank."""
    readers = strategy.grid(trainer.ranks).data
    return trainer.global_batch or batch_size * (trainer.accumulate_grad_batches or 1) * readers


def _at_least(lowest: int, name: str, value: int | None) -> None:
    if value is not None and value < lowest:
        raise ValueError(f"{name} is {value}; it must be at least {lowest}")
