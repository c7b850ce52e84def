"""One training run from a checked config: open its directory, build its parts, train, finish its files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console

from lightsparse.config.schema import Config
from lightsparse.data.module import DataModule
from lightsparse.data.run_tokenizer import keep_tokenizer, with_run_tokenizer
from lightsparse.distributed.environment import ignore_stray_ranks, is_first_rank
from lightsparse.distributed.strategies import GridStrategy, ShardedStrategy
from lightsparse.distributed.strategy_config import ContextRanks
from lightsparse.kernels.compute_dtype import product_dtype
from lightsparse.models.transformer import Transformer
from lightsparse.patterns import BlockLayout
from lightsparse.training.checkpoints.lock import unlock
from lightsparse.training.checkpoints.run_directory import RunDirectory, Start
from lightsparse.training.endings import resumable
from lightsparse.training.init_from import load_start
from lightsparse.training.lightning_warnings import quiet_lightning
from lightsparse.training.measures import attention_stats
from lightsparse.training.metrics.metrics_file import MetricsFile, read_metrics
from lightsparse.training.metrics.outputs import draw_plots, send_pictures, write_sample
from lightsparse.training.metrics.recorder import Recorder
from lightsparse.training.metrics.summary import show, summarize
from lightsparse.training.module import LanguageModel, language_model
from lightsparse.training.preflight.check import check_resumable, fixed_layout, set_machine
from lightsparse.training.preflight.flops import matmul_error, matmul_peak
from lightsparse.training.same_config_check import begin_together, values_to_agree_on
from lightsparse.training.trainer import build_trainer
from lightsparse.utils.atomic_files import write_text
from lightsparse.utils.text import count_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run, built and ready to train."""

    config: Config
    directory: RunDirectory
    start: Start
    console: Console  # silent on every rank but the first
    data: DataModule
    module: LanguageModel
    recorder: Recorder
    trainer: Trainer
    layout: BlockLayout | None  # what the attention reads in one document of a whole context, where that is fixed


def fit(config: Config) -> dict[str, Any]:
    """Train to config.trainer.max_steps, or from the newest checkpoint on, and return the summary.

    A run that has finished already is not repeated: its summary is shown and returned. Every rank of a job calls this.
    Raises ConfigError (the directory forbids it), DataError (other data than the checkpoint's), NonFiniteError, and
    RankError when another rank is lost or does not come within strategy.timeout.
    """
    directory = RunDirectory.of(config)
    recorder = Recorder(config, directory)  # its clock starts
    for line in ignore_stray_ranks():  # where no command line has
        log.warning(line)
    console = Console(quiet=not is_first_rank(), highlight=False, markup=False, soft_wrap=True)  # lines as they are
    try:
        with resumable(config):
            start = open_directory(config, directory)
            if start.summary is not None:
                console.print(f"{directory.path} is finished at step {start.summary['steps']}")
                show(console, start.summary, directory.path)
                return start.summary
            run = build(config, directory, start, recorder, console)
            train(run)
            return finish(run)
    finally:
        unlock(directory.path)


def open_directory(config: Config, directory: RunDirectory) -> Start:
    """Where the run starts from; nothing is written yet."""
    quiet_lightning()
    set_machine(config)  # first: what this machine refuses leaves no directory behind
    return directory.open(config)


def build(config: Config, directory: RunDirectory, start: Start, recorder: Recorder, console: Console) -> Run:
    """Data, model and trainer; nothing is written yet."""
    seed_everything(config.seed, workers=True, verbose=False)
    tokenized = with_run_tokenizer(config.data, directory.path, resumed=start.checkpoint is not None)
    data = DataModule(tokenized, config.seed, config.eval.tokens)
    data.setup()
    module = language_model(config, data.tokenizer)
    if start.checkpoint is not None:
        check_resumable(data, module, start.checkpoint)
    elif config.init_from is not None:
        console.print(load_start(config, module.model))
    if config.compile:
        module.model.compile()  # in place: the names in the checkpoint stay as they are
    trainer = build_trainer(config, directory, recorder, console)
    return Run(config, directory, start, console, data, module, recorder, trainer, fixed_layout(config))


def train(run: Run) -> None:
    """All steps and validations; the first rank says before what runs on what machine, from which step."""
    strategy = run.trainer.strategy
    if isinstance(strategy, GridStrategy):
        strategy.when_met = partial(begin_ranks, run)
    else:
        prepare(run)
    if is_first_rank():
        device = run.trainer.strategy.root_device
        run.recorder.peak = matmul_peak(device, product_dtype(run.config.precision, device))
        for line in opening_lines(run, device):
            run.console.print(line)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.start.checkpoint, weights_only=True)
    run.recorder.measure_memory(run.trainer)


def begin_ranks(run: Run, group: dist.ProcessGroup | None) -> None:
    """`prepare` on the first rank, once all ranks have met and agreed. Every rank calls this."""
    values = values_to_agree_on(run.config, run.directory, run.start.step, run.data.fingerprint)
    seen = run.directory.identity if run.config.strategy.sharded else None
    begin_together(values, partial(prepare, run), seen, group)


def prepare(run: Run) -> None:
    """An earlier run stays as it is until this, when everything that may be refused has been."""
    run.directory.prepare(run.config)
    if run.start.checkpoint is None:
        keep_tokenizer(run.data.tokenizer, run.directory.path)
    rows = MetricsFile(run.directory.metrics, attention_stats.columns(run.config))
    rows.rewind(run.start.step if run.start.checkpoint else -1)


def finish(run: Run) -> dict[str, Any]:
    """Plots, sample and summary, which is returned."""
    config, directory, trainer = run.config, run.directory, run.trainer
    writer = _whole_model(run)
    rows = read_metrics(directory.metrics)
    if is_first_rank():
        draw_plots(config, run.module, directory, run.layout, rows)
        send_pictures(trainer.loggers[1:], directory.plots, trainer.global_step)
        write_sample(config, writer.to(trainer.strategy.root_device), run.data, directory)
    tokens = run.recorder.tokens(trainer)
    summary = summarize(config, run.module, run.recorder, rows, steps=trainer.global_step, tokens=tokens)
    if is_first_rank():
        write_text(directory.summary, json.dumps(summary, indent=2) + "\n")  # last: it says that all is there
        show(run.console, summary, directory.path)
    return summary


def _whole_model(run: Run) -> LanguageModel:
    """A module that the first rank can run alone, unlike what it holds of a sharded one. Every rank calls this."""
    strategy = run.trainer.strategy
    if not isinstance(strategy, ShardedStrategy):
        return run.module
    weights = strategy.gathered_weights()
    if not is_first_rank():
        return run.module
    whole = language_model(run.config, run.data.tokenizer)
    whole.load_state_dict(weights)
    whole.model.set_step(max(run.trainer.global_step - 1, 0), run.config.trainer.max_steps)
    return whole


def opening_lines(run: Run, device: torch.device) -> list[str]:
    """What runs, on what text, on which machine, from where: a line each."""
    config, model, data = run.config, run.module.model, run.data
    parameters = sum(parameter.numel() for parameter in model.parameters())
    density = "" if run.layout is None else f" · density {run.layout.density():.3g}"
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    precision = "fp32" if config.precision == "32" else config.precision
    lines = [
        f"model    {config.attention.name} · {count_text(parameters)} parameters · "
        f"context {config.data.context}{density}",
        f"text     {type(config.data).__name__} · {count_text(data.samples.train_tokens)} training tokens · "
        f"fingerprint {data.fingerprint}",
        f"machine  {where} · {precision} · matmul {config.matmul_precision}: "
        f"{run.recorder.peak / 1e9:.0f} GFLOP/s, fp32 error {matmul_error(device):.0e}",
    ]
    if "S" not in config.model.layers:
        name, pattern = config.attention.name, config.model.layer_pattern
        lines.append(f"layers   {pattern}, none of them S: attention={name} is in no layer")
    if config.trainer.selector_only_steps:
        lines.append(_selector_only(config, model))
    grid, strategy = config.grid, config.strategy
    if grid.ranks > 1:
        line = f"ranks    {grid.ranks} = {grid.data} data × {grid.context} context · {strategy.kind}"
        if isinstance(strategy, ContextRanks):
            line += f" · split {strategy.split}, exchange {strategy.key_exchange}"
        lines.append(line)
    path, checkpoint = run.directory.path, run.start.checkpoint
    how = "starts" if checkpoint is None else f"continues from step {run.start.step} ({checkpoint.name})"
    return [*lines, f"run      {path} {how}"]


def _selector_only(config: Config, model: Transformer) -> str:
    """Which steps train what alone."""
    only, last = config.trainer.selector_only_steps, config.trainer.max_steps
    steps = "all steps" if not 0 <= only < last else f"steps 1 to {only} of {last}"
    count = sum(parameter.numel() for parameter in model.selector_parameters())
    return f"stage    {steps} train only what selects: {count_text(count)} parameters"
