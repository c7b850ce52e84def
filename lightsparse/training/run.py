"""One training run from a checked config: directory, data, model, trainer, and what is left when it ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from rich.console import Console

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data.module import DataModule
from lightsparse.data.run_tokenizer import keep_tokenizer, with_run_tokenizer
from lightsparse.distributed.environment import is_first_rank, of_all_ranks
from lightsparse.distributed.strategies import ShardedStrategy
from lightsparse.distributed.strategy_config import ContextRanks, SeveralRanks
from lightsparse.kernels import flash, set_backend
from lightsparse.kernels.compute_dtype import product_dtype
from lightsparse.models.transformer import Transformer
from lightsparse.patterns import BlockLayout
from lightsparse.training.checkpoints.files import checkpoint_steps, described_checkpoint
from lightsparse.training.checkpoints.lock import unlock
from lightsparse.training.checkpoints.run_directory import RunDirectory, Start
from lightsparse.training.init_from import load_start
from lightsparse.training.lightning_warnings import quiet_lightning
from lightsparse.training.metrics import attention_stats
from lightsparse.training.metrics.metrics_file import MetricsFile, read_metrics
from lightsparse.training.metrics.outputs import draw_plots, write_sample
from lightsparse.training.metrics.plots import send_pictures
from lightsparse.training.metrics.recorder import Recorder
from lightsparse.training.metrics.summary import show, summarize
from lightsparse.training.module import LanguageModel, language_model
from lightsparse.training.preflight.check import layout_of
from lightsparse.training.preflight.flops import matmul_error, matmul_peak
from lightsparse.training.trainer import build_trainer
from lightsparse.utils.atomic_files import write_text
from lightsparse.utils.compat.lightning import datamodule_state
from lightsparse.utils.machine import current_rss, peak_rss
from lightsparse.utils.rank_errors import RankError, RankTimeoutError, ranks_named
from lightsparse.utils.text import count_text


def fit(config: Config, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Train to config.trainer.max_steps, or from the newest checkpoint on, and return the summary.

    raw  the composed config as plain values; it is kept in the run directory and compared on resume
    A run that has finished already is not repeated: its summary is shown and returned. Every rank of a job calls this.
    Raises ConfigError (the directory forbids it), DataError (other data than the checkpoint's), NonFiniteError, and
    RankError when another rank is lost or does not come within strategy.timeout.
    """
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    try:
        return _fit(config, raw, directory)
    finally:
        unlock(directory.path)


def _fit(config: Config, raw: Mapping[str, Any], directory: RunDirectory) -> dict[str, Any]:
    started, imported = time.perf_counter(), current_rss()
    quiet_lightning()
    is_first = is_first_rank()
    console = Console(quiet=not is_first, highlight=False, markup=False, soft_wrap=True)  # lines as they are
    set_machine(config)  # first: what this machine refuses leaves no directory behind
    start = directory.open(config.resume, raw, config.trainer.max_steps)
    if start.summary is not None:
        console.print(f"{directory.path} is finished at step {start.summary['steps']}")
        show(console, start.summary, directory.path)
        return start.summary

    seed_everything(config.seed, workers=True, verbose=False)
    tokenized = with_run_tokenizer(config.data, directory.path, resumed=start.checkpoint is not None)
    data = DataModule(tokenized, config.seed, config.eval.tokens)
    data.setup()
    module = language_model(config, data.tokenizer)
    if start.checkpoint is not None:
        check_resumable(data, module, start.checkpoint)
    model = module.model
    if config.init_from is not None and start.checkpoint is None:
        console.print(load_start(config, model))
    if config.compile:
        model.compile()  # in place: the names in the checkpoint stay as they are
    if is_first:  # not before everything that may be refused has been: an earlier run stays as it is
        directory.prepare(raw)
        if start.checkpoint is None:
            keep_tokenizer(data.tokenizer, directory.path)
        MetricsFile(directory.metrics, attention_stats.columns(config)).rewind(start.step if start.checkpoint else -1)
    recorder = Recorder(config, raw, directory, started=started)
    trainer = build_trainer(config, raw, start.step, directory, recorder, console)
    device = trainer.strategy.root_device
    layout = _layout(config)
    if is_first:
        recorder.peak = matmul_peak(device, product_dtype(config.precision, device))
        for line in _opening(config, model, data, layout, device, recorder.peak):
            console.print(line)
        console.print(_beginning(directory, start))

    with _ranks_together(config, directory):
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
        recorder.peak_memory = max(of_all_ranks(_peak_memory(device, imported)), default=0)
        strategy = trainer.strategy
        weights = strategy.gathered_weights() if isinstance(strategy, ShardedStrategy) else None
    if is_first:
        draw_plots(config, module, directory, layout, read_metrics(directory.metrics))
        send_pictures(trainer.loggers[1:], directory.plots, trainer.global_step)
        writer = module
        if weights is not None:  # what is left of a sharded model on one rank cannot run
            writer = language_model(config, data.tokenizer)
            writer.load_state_dict(weights)
            writer.model.set_step(max(trainer.global_step - 1, 0), config.trainer.max_steps)
        write_sample(config, writer.to(device), data, directory)
    summary = summarize(
        config,
        module,
        recorder,
        read_metrics(directory.metrics),
        steps=trainer.global_step,
        tokens=recorder.tokens(trainer),
    )
    if is_first:
        write_text(directory.summary, json.dumps(summary, indent=2) + "\n")  # last: it says that all is there
        show(console, summary, directory.path)
    return summary


@contextmanager
def _ranks_together(config: Config, directory: RunDirectory) -> Iterator[None]:
    """Say in one sentence that another rank is lost, and from where the run can go on."""
    timeout = config.strategy.timeout if isinstance(config.strategy, SeveralRanks) else None
    try:
        with ranks_named(timeout):
            yield
    except RankError as error:
        sentence = str(error)
        if isinstance(error, RankTimeoutError) and "strategy.timeout" not in sentence:  # from inside the attention
            sentence += f" within {timeout:g} s (strategy.timeout)"
        step = max(checkpoint_steps(directory.checkpoints), default=0)
        raise type(error)(f"{sentence}; the same command continues from step {step}") from error


def _peak_memory(device: torch.device, imported: int) -> int:
    """Bytes that this rank has taken at most: of the device, or of main memory beyond what the imports hold."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss() - imported


def check_resumable(data: DataModule, module: LanguageModel, checkpoint: Path) -> None:
    """Refuse a checkpoint of other data or another model now: Lightning would when the directory has been written.

    Raises DataError in the data module's words, and ConfigError for weights of another shape.
    """
    saved = described_checkpoint(checkpoint)
    data.load_state_dict(datamodule_state(saved, data))
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in saved["state_dict"].items()}
    for name in sorted(own.keys() | there.keys()):
        if own.get(name) != there.get(name):
            raise ConfigError(
                f"{checkpoint} has {name} {_shape_text(there.get(name))}, the model of this run has "
                f"{_shape_text(own.get(name))}: another vocabulary or version; restore it or start afresh with "
                "name=<another>"
            )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "not at all" if shape is None else f"of shape {list(shape)}"


def set_machine(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # or the launcher shares the cores among its ranks
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        set_backend(config.kernels.backend)
        flash.activate(config.kernels.flash)
    except ValueError as error:  # what only this machine knows; the names were checked with the schema
        raise ConfigError(f"kernels.{str(error).removeprefix('kernels.')}") from error


def _layout(config: Config) -> BlockLayout | None:
    """What the chosen attention reads in one document of a whole context; None where no layer uses it or where that
    depends on the input."""
    if "S" not in config.model.layers:
        return None
    try:
        return layout_of(config)
    except NotImplementedError:
        return None


def _opening(
    config: Config,
    model: Transformer,
    data: DataModule,
    layout: BlockLayout | None,
    device: torch.device,
    peak: float,
) -> list[str]:
    """What runs, on what text, on which machine: a line each."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    density = "" if layout is None else f" · density {layout.density():.3g}"
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    precision = "fp32" if config.precision == "32" else config.precision
    lines = [
        f"model    {config.attention.name} · {count_text(parameters)} parameters · "
        f"context {config.data.context}{density}",
        f"text     {type(config.data).__name__} · {count_text(data.samples.train_tokens)} training tokens · "
        f"fingerprint {data.fingerprint}",
        f"machine  {where} · {precision} · matmul {config.matmul_precision}: "
        f"{peak / 1e9:.0f} GFLOP/s, fp32 error {matmul_error(device):.0e}",
    ]
    if "S" not in config.model.layers:
        name, pattern = config.attention.name, config.model.layer_pattern
        lines.append(f"layers   {pattern}, none of them S: attention={name} is in no layer")
    if config.trainer.selection_only_steps:
        lines.append(_selection_only(config, model))
    grid, strategy = config.grid, config.strategy
    if grid.ranks > 1:
        line = f"ranks    {grid.ranks} = {grid.data} data × {grid.context} context · {strategy.kind}"
        if isinstance(strategy, ContextRanks):
            line += f" · split {strategy.split}, exchange {strategy.exchange}"
        lines.append(line)
    return lines


def _selection_only(config: Config, model: Transformer) -> str:
    """Which steps train what alone."""
    only, last = config.trainer.selection_only_steps or 0, config.trainer.max_steps
    steps = "all steps" if not 0 <= only < last else f"steps 1 to {only} of {last}"
    count = sum(parameter.numel() for parameter in model.selection_parameters())
    return f"stage    {steps} train only what selects: {count_text(count)} parameters"


def _beginning(directory: RunDirectory, start: Start) -> str:
    if start.checkpoint is None:
        return f"run      {directory.path} starts"
    return f"run      {directory.path} continues from step {start.step} ({start.checkpoint.name})"
