"""`python train.py … doctor=true`: what this run would meet here, looked up or measured before anything is spent on it.

One line per check: ok, warning, or problem with the way out. Nothing stays written and no rank is started; the timed
pass is one of this process's own. Exit code 2 where there is a problem, else 0.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich.console import Console

from lightsparse.config.context_split import context_split
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataError
from lightsparse.data.module import DataModule
from lightsparse.distributed.environment import is_first_rank
from lightsparse.training.checkpoints.files import newest_checkpoint
from lightsparse.training.checkpoints.lock import holder
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.module import language_model
from lightsparse.training.preflight.check import (
    check_disk,
    check_model,
    check_resumable,
    fixed_layout,
    meta_model,
    set_machine,
)
from lightsparse.training.preflight.estimate import estimate
from lightsparse.training.preflight.flops import matmul_error, matmul_peak
from lightsparse.training.preflight.out_of_memory import (
    check_memory,
    is_out_of_memory,
    memory_per_rank,
    room_for_layers,
    ways_out,
)
from lightsparse.training.preflight.timed_pass import Pass, flops, timed
from lightsparse.utils import file_lock
from lightsparse.utils.machine import usable_cores
from lightsparse.utils.text import count_text, duration, size

_LONGEST = 5.0  # seconds that the timed pass may take; a longer one is extrapolated
_SMALL = 1024  # tokens of the pass that is extrapolated from
_SPARE = 0.8  # share of the free memory or disk above which a warning says so
_ROUNDED = 1e-4  # relative error of an fp32 product that tells of rounded factors


@dataclass(frozen=True)
class Line:
    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str


def examine(config: Config) -> float:
    """Print the lines and end with code 2 where one is a problem; else nan, in place of a run's result."""
    if not is_first_rank():
        return math.nan
    console = Console(highlight=False, markup=False, soft_wrap=True)
    levels = []
    for line in checks(config):
        levels.append(line.level)
        console.print(f"{line.level:<8} {line.subject:<8} {line.text}")
    problems, warnings = levels.count("problem"), levels.count("warning")
    console.print(f"{problems} problems, {warnings} warnings; nothing was trained or written")
    if problems:
        sys.exit(2)
    return math.nan


def checks(config: Config) -> Iterator[Line]:
    """The lines, each as soon as it is known; what depends on a check with a problem is left out."""
    for subject, first in (("memory", _least_memory), ("config", _shape)):
        lines = list(_named(subject, first, config))
        yield from lines
        if any(line.level == "problem" for line in lines):
            return
    yield from _named("run", _directory, config)
    yield from _named("disk", _disk, config)
    yield from _named("ranks", _ranks, config)
    machine = list(_named("machine", _machine, config))
    yield from machine
    data = DataModule(config.data, config.seed, config.eval.tokens)
    text = list(_named("data", _text, config, data))
    yield from text
    measured: list[Pass] = []
    if not any(line.level == "problem" for line in (*machine, *text)):
        yield from _named("time", _time, config, data, measured)
    yield from _named("memory", _memory, config, measured)


def _named(subject: str, check: Callable[..., Iterator[Line]], *given: Any) -> Iterator[Line]:
    """The check's lines; a refusal becomes a problem."""
    try:
        yield from check(*given)
    except (ConfigError, DataError) as error:
        yield Line("problem", subject, str(error))


# ---- looked up --------------------------------------------------------------------------------------------------


def _least_memory(config: Config) -> Iterator[Line]:
    check_memory(config)
    yield from ()


def _shape(config: Config) -> Iterator[Line]:
    model = check_model(config)
    layout = fixed_layout(config)
    density = "" if layout is None else f", density {layout.density():.3g}"
    parameters = count_text(sum(parameter.numel() for parameter in model.parameters()))
    yield Line("ok", "config", f"{config.name}: {parameters} parameters, context {config.data.context}{density}")


def _directory(config: Config) -> Iterator[Line]:
    directory = RunDirectory.of(config)
    owner = holder(directory.path)
    if owner is not None:
        yield Line("problem", "run", f"{directory.path} is being written by {owner}; use name=<another>")
        return
    start = directory.look(config)
    if start.summary is not None:
        yield Line("ok", "run", f"{directory.path} is finished at step {start.summary['steps']}; nothing would be done")
    elif start.checkpoint is None:
        yield Line("ok", "run", f"{directory.path} would start")
    else:
        yield Line("ok", "run", f"{directory.path} would continue from step {start.step} ({start.checkpoint.name})")


def _disk(config: Config) -> Iterator[Line]:
    model = meta_model(config)
    folder, free = check_disk(config, model)
    with TemporaryDirectory(dir=folder) as probe:
        file_lock.take(Path(probe), ConfigError).release()
    needed = estimate(config)
    shards = config.ranks if config.strategy.sharded else 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    one = parameters * (2 if config.precision == "bf16-true" else 4) + needed.optimizer * shards
    most = config.checkpoint.keep + config.checkpoint.keep_best + 1  # a new one is whole before the oldest goes
    level: Literal["ok", "warning"] = "warning" if most * one > _SPARE * free else "ok"
    yield Line(level, "disk", f"checkpoints of {size(one)}, at most {most} at a time, {size(free)} free at {folder}")


def _ranks(config: Config) -> Iterator[Line]:
    grid, trainer, samples = config.grid, config.trainer, config.samples_per_step
    step = f"{samples} samples, {count_text(samples * config.data.context)} tokens per step"
    split = context_split(config, meta_model(config))
    shared = ""
    if split is not None:
        groups = [f"{first}–{first + grid.context - 1}" for first in range(0, grid.ranks, grid.context)]
        shared = f"; ranks {', '.join(groups)} share a sequence, {min(split.counts)} to {max(split.counts)} tokens each"
    text = f"{grid.ranks} = {grid.data} data × {grid.context} context, {config.strategy.kind}; {step}{shared}"
    gpus = torch.cuda.device_count()
    if gpus and trainer.devices > gpus:
        yield Line(
            "problem", "ranks", f"trainer.devices is {trainer.devices} and this machine has {gpus} GPUs; lower it"
        )
        return
    threads = trainer.devices * (config.threads or 1)
    if not gpus and threads > usable_cores():
        yield Line(
            "warning",
            "ranks",
            f"{text}; {trainer.devices} ranks with {config.threads or 1} threads share {usable_cores()} cores of this "
            "machine: lower trainer.devices or threads",
        )
        return
    yield Line("ok", "ranks", text)


# ---- measured ---------------------------------------------------------------------------------------------------


def _machine(config: Config) -> Iterator[Line]:
    set_machine(config)
    device = _device()
    full, half = matmul_peak(device, torch.float32), matmul_peak(device, torch.bfloat16)
    error = matmul_error(device)
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    text = f"{where}: matmul {full / 1e9:.0f} GFLOP/s in fp32 ({config.matmul_precision}, error {error:.0e})"
    text += f", {half / 1e9:.0f} in bf16; precision {config.precision}"
    if config.precision == "32" and error > _ROUNDED:
        yield Line("warning", "machine", f"{text}; fp32 products are rounded: matmul_precision=highest is exact")
    elif config.precision != "32" and half < full:
        yield Line("warning", "machine", f"{text}; bf16 is no faster here: precision=32 is more exact")
    else:
        yield Line("ok", "machine", text)


def _text(config: Config, data: DataModule) -> Iterator[Line]:
    started = time.perf_counter()
    data.setup()
    seconds = time.perf_counter() - started
    start = newest_checkpoint(RunDirectory.of(config).checkpoints)
    if start is not None:
        check_resumable(data, language_model(config, data.tokenizer), start[1])
    samples = len(data.train_dataloader().dataset)  # type: ignore[arg-type]
    epochs = config.trainer.max_steps * config.samples_per_step / samples
    yield Line(
        "ok",
        "data",
        f"{type(config.data).__name__}: {count_text(data.samples.train_tokens)} training tokens, {samples:,} samples "
        f"per epoch, {epochs:.2g} epochs in {config.trainer.max_steps} steps; fingerprint {data.fingerprint}; read in "
        f"{seconds:.1f} s",
    )


def _time(config: Config, data: DataModule, measured: list[Pass]) -> Iterator[Line]:
    """One pass of one micro-batch on one rank; `measured` takes it where it had the run's own shape."""
    device = _device()
    module = language_model(config, data.tokenizer)
    if config.precision == "bf16-true":
        module.bfloat16()
    module = module.to(device).train()
    batch = {name: value.to(device) for name, value in next(iter(data.train_dataloader())).items()}
    context, ranks = config.data.context, config.grid.context
    _, free = memory_per_rank(config)
    try:
        timed(config, module, batch, 1, min(context, 128))  # loads libraries, builds kernels
        taken = timed(config, module, batch, 1, min(context, _SMALL))
        expected = (
            taken.seconds
            * flops(config, module, config.data.batch_size, context)
            / flops(config, module, 1, taken.context)
        )
        needed = estimate(config)
        fits = needed.total < _SPARE * free and needed.main_memory <= room_for_layers(config)
        if ranks == 1 and expected < _LONGEST and fits:
            taken = timed(config, module, batch, config.data.batch_size, context)
            measured.append(taken)
            seconds, how = taken.seconds, "measured at the run's own shape"
        else:
            seconds, how = expected / ranks, f"extrapolated by FLOPs from {taken.tokens} tokens"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        yield Line("problem", "time", f"the timed pass ran out of memory; {ways_out(config, 0.5 * free)}")
        return
    step = seconds * config.accumulate_grad_batches
    validations = 1 + math.ceil(config.trainer.max_steps / config.eval.every_n_steps)
    passes = config.eval.tokens / (config.data.batch_size * context) / config.grid.data
    validating = validations * passes * seconds / 3  # forward only
    text = (
        f"a micro-batch takes {seconds:.2g} s forward and backward ({how}): {config.trainer.max_steps} steps in about "
        f"{duration(step * config.trainer.max_steps)}, {validations} validations in about {duration(validating)}"
    )
    if config.ranks > 1:
        text += ", without what ranks send to each other"
    limit = config.trainer.max_time
    if limit is not None and step > limit:
        yield Line("problem", "time", f"{text}; trainer.max_time={limit:g} ends it before the first step: raise it")
        return
    yield Line("ok", "time", text)


def _memory(config: Config, measured: list[Pass]) -> Iterator[Line]:
    needed = estimate(config)
    total, free = memory_per_rank(config)
    text = f"about {needed} per rank"
    if measured:
        text += f", {size(measured[0].peak)} of it measured in the timed pass"
    text += f"; {size(free)} of {size(total)} are free"
    room = room_for_layers(config)
    if needed.main_memory:
        text += f", and of main memory {size(room)} may be taken"
    if needed.total > free or needed.main_memory > room:
        yield Line("problem", "memory", f"{text}; {ways_out(config, free)}")
    elif needed.total > _SPARE * free:
        yield Line("warning", "memory", f"{text}; for more room {ways_out(config, _SPARE * free)}")
    else:
        yield Line("ok", "memory", text)


def _device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
