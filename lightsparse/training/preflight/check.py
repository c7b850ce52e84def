"""Everything that can be found wrong without computing: shapes, density, targets, disk, the checkpoint to resume from.

Everything wrong is a ConfigError of one sentence.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import nn

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.config.build import ClassChoice
from lightsparse.config.context_split import context_split
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data.module import DataModule
from lightsparse.distributed.environment import is_first_rank
from lightsparse.kernels import flash, flex, set_backend
from lightsparse.models.transformer import Transformer
from lightsparse.optim.optimizers import parameter_groups
from lightsparse.patterns import BlockLayout
from lightsparse.training.checkpoints.files import checkpoint_steps, described_checkpoint
from lightsparse.training.init_from import check_start
from lightsparse.training.module import LanguageModel
from lightsparse.utils.compat.lightning import datamodule_state

_NOT_FOLLOWED = {  # callbacks of Lightning that change the trainer under a run, and what does the same here
    GradientAccumulationScheduler: "set trainer.accumulate_grad_batches",
    BatchSizeFinder: "doctor=true says what fits; set data.batch_size",
    LearningRateFinder: "sweep optimizer.lr with -m",
    StochasticWeightAveraging: "use schedule=wsd, or lightning.pytorch.callbacks.EMAWeightAveraging",
    BaseFinetuning: "trainer.selector_only_steps trains a part first",
    ModelPruning: "leave it out",
}


def check(config: Config) -> None:
    """Everything that can be found wrong without computing: shapes, density, targets, disk. Raises ConfigError."""
    check_disk(config, check_model(config))


def check_model(config: Config) -> Transformer:
    """`check` without the disk; the model on the meta device."""
    if config.model.activation_checkpointing == "offload" and not torch.cuda.is_available():
        raise ConfigError(
            "model.activation_checkpointing is offload and this run is on the CPU, which has no other memory than the "
            "main one; use model.activation_checkpointing=true"
        )
    for group, kind in (("logger", Logger), ("callbacks", Callback)):
        for name, node in getattr(config, group).items():
            if node is not None:
                target = ClassChoice.of(node, f"{group}.{name}", kind, config.allow_targets).target
                for refused, instead in _NOT_FOLLOWED.items():
                    if issubclass(target, refused):
                        raise ConfigError(
                            f"{group}.{name} is {target.__name__}, which changes what a step is, so that a resumed run "
                            f"would not be the same; {instead}"
                        )
                if issubclass(target, WandbLogger) and is_first_rank():
                    _check_wandb(f"{group}.{name}", node)
    if config.eval.tokens < config.data.context:
        raise ConfigError(
            f"eval.tokens is {config.eval.tokens}; it must hold one sample of data.context={config.data.context} tokens"
        )
    with contextlib.suppress(NotImplementedError):  # no layout before there is an input
        layout_of(config)
    model = meta_model(config)
    if config.init_from is not None and not checkpoint_steps(Path(config.runs_dir, config.name, "checkpoints")):
        check_start(config, model.vocab_size)
    config.optimizer.build(parameter_groups(model, model.layers))
    only = config.trainer.selector_only_steps
    if only and not model.selector_parameters():
        raise ConfigError(
            f"trainer.selector_only_steps is {only}, and attention={config.attention.name} has no parameters that "
            "select, so that nothing would be trained; set it to 0"
        )
    context_split(config, model)
    return model


def _check_wandb(name: str, node: Mapping[str, Any]) -> None:
    """Refuse an online logger of a user without a key: wandb would when the run has begun."""
    if node.get("offline") or node.get("mode", os.environ.get("WANDB_MODE", "online")) != "online":
        return
    import wandb

    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.UsageError:
        has_key = False
    if not has_key:
        raise ConfigError(
            f"{name} is online, and wandb has no key of this user; run `wandb login` or set {name}.offline=true"
        )


def meta_model(config: Config) -> Transformer:
    """The model on the meta device: shapes without memory. Raises ConfigError where its attention cannot take them."""
    with torch.device("meta"):
        return Transformer(
            config.model,
            config.attention.build,
            vocab_size=config.data.vocab_size,
            causal=config.objective == "causal",
            context=config.data.context,
        )


def layout_of(config: Config) -> BlockLayout:
    """The layout of one layer over data.context tokens of one document, on the CPU.

    Raises ConfigError when the variant cannot reach what is asked (a density, say), with its reason, and
    NotImplementedError for a variant that chooses its blocks from its input.
    """
    embed_dim, heads, kv_heads, head_dim, _ = config.model.widths
    context, causal = config.data.context, config.objective == "causal"
    shape = AttentionShape(heads, kv_heads, head_dim, embed_dim, causal=causal, context=context)
    ctx = SequenceContext(positions=torch.arange(context)[None])
    try:
        return config.attention.build(shape).layout(context, ctx, torch.device("cpu"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fixed_layout(config: Config) -> BlockLayout | None:
    """`layout_of` where it is known before there is an input; None where it depends on that, or no layer uses it."""
    if "S" not in config.model.layers:
        return None
    try:
        return layout_of(config)
    except NotImplementedError:
        return None


def check_disk(config: Config, model: nn.Module) -> tuple[Path, int]:
    """Refuse a run whose checkpoints do not fit beside each other: weights, and two optimizer states at most.

    Returns the folder above them that is there, and the bytes free in it.
    """
    bytes_each = 2 if config.precision == "bf16-true" else 4
    size = 3 * bytes_each * sum(parameter.numel() for parameter in model.parameters())
    run = Path(config.runs_dir, config.name).absolute()
    written = len(list((run / "checkpoints").glob("step-*.ckpt")))
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    needed = size * max(1, kept + 1 - written)  # a new one is whole before the oldest goes
    folder = next(folder for folder in (run, *run.parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is no folder" if not folder.is_dir() else "cannot be written to"
        raise ConfigError(f"runs_dir is {config.runs_dir}, but {folder} {reason}; set runs_dir=<another folder>")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"runs_dir is {config.runs_dir}, where {free / 2**30:.1f} GiB are free, and checkpoints of "
            f"{size / 2**30:.1f} GiB with checkpoint.keep={config.checkpoint.keep} take {needed / 2**30:.1f} GiB more; "
            "keep fewer, free space or set runs_dir=<another disk>"
        )
    return folder, free


def check_resumable(data: DataModule, module: LanguageModel, checkpoint: Path) -> None:
    """Refuse a checkpoint of other data or another model now: Lightning would when the directory has been written.

    Raises DataError in the data module's words, and ConfigError for weights of another shape.
    """
    saved = described_checkpoint(checkpoint)
    data.load_state_dict(datamodule_state(saved, data))
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in saved["state_dict"].items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{checkpoint} is of another vocabulary or version: {name} is {_shape_text(theirs.get(name))} there "
                f"and {_shape_text(ours.get(name))} in this run's model; restore it or start again with name=<another>"
            )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def set_machine(config: Config) -> None:
    """Set what is global to a process: threads, matmul precision, kernels. Raises ConfigError for an absent kernel."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # or Lightning chooses for the ranks it starts
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        set_backend(config.kernels.backend)
        flash.activate(config.kernels.flash)
        flex.use_kernel(config.kernels.flex_backend)
    except ValueError as error:  # what only this machine knows; the names were checked with the schema
        raise ConfigError(f"kernels.{str(error).removeprefix('kernels.')}") from error
