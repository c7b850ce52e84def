"""Lightning's Trainer as a run needs it: our files and clocks, nothing of its own on disk or screen."""

from __future__ import annotations

import inspect

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lightsparse.config.build import ClassChoice
from lightsparse.config.compose import handing
from lightsparse.config.schema import Config
from lightsparse.distributed.environment import cluster_environment, is_first_rank, launched_ranks
from lightsparse.distributed.strategies import GridStrategy, strategy_for
from lightsparse.evaluation.callback import TaskEvaluation
from lightsparse.training.checkpoints.background_writer import CheckpointWriter
from lightsparse.training.checkpoints.callback import StepCheckpoint
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.measures import attention_stats
from lightsparse.training.metrics.metrics_file import MetricsFile
from lightsparse.training.metrics.progress import TrainingProgress
from lightsparse.training.metrics.recorder import Recorder


def build_trainer(config: Config, directory: RunDirectory, recorder: Recorder, console: Console) -> Trainer:
    """Lightning's trainer with our files and clocks; validation before the first step and after the last one."""
    loggers: list[Logger] = [MetricsFile(directory.metrics, attention_stats.columns(config))]
    for name, node in config.logger.items():
        if node is not None:
            choice = ClassChoice.of(node, f"logger.{name}", Logger, config.allow_targets)
            ours = {"save_dir": str(directory.path)}
            if is_first_rank():  # the others may be here before it, and do not log
                ours["id"] = directory.run_id
            takes = inspect.signature(choice.target).parameters
            given = {key: value for key, value in ours.items() if key in takes and key not in node}
            loggers.append(choice.build(**given))
    callbacks: list[Callback] = [recorder]
    if config.trainer.progress:
        callbacks.append(TrainingProgress(recorder, console))
    if config.eval.tasks.names:
        callbacks.append(TaskEvaluation(config, directory.path / "evaluation"))
    for name, node in config.callbacks.items():
        if node is not None:
            callbacks.append(ClassChoice.of(node, f"callbacks.{name}", Callback, config.allow_targets).build())
    writer = CheckpointWriter(config.checkpoint.background, config.checkpoint.timeout)
    callbacks.append(StepCheckpoint(config, directory.checkpoints, writer, saved=recorder.release))
    strategy = strategy_for(config.strategy, config.ranks)
    if isinstance(strategy, GridStrategy) and launched_ranks() is None:
        strategy.handed = handing(config.composed)
    return Trainer(
        strategy=strategy,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        precision=config.precision,
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.trainer.grad_clip,
        num_sanity_val_steps=-1,  # the whole validation before step 1, unless the run resumes
        check_val_every_n_epoch=None,
        val_check_interval=config.eval.every_n_steps * config.accumulate_grad_batches,
        log_every_n_steps=config.trainer.log_every_n_steps,
        use_distributed_sampler=False,  # the data module shards by itself
        enable_model_summary=False,
        enable_progress_bar=config.trainer.progress,
        logger=loggers,
        callbacks=callbacks,
        plugins=[writer, cluster_environment()],
        default_root_dir=directory.path,
    )
