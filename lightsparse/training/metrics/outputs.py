"""What a finished run leaves beside its numbers: plots, also in its loggers, and a sample of what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lightsparse.config.schema import Config
from lightsparse.data.module import DataModule
from lightsparse.patterns import BlockLayout
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.metrics.sample import answers, continuation, infilling
from lightsparse.training.module import FIRST_BUCKET, LanguageModel
from lightsparse.utils.atomic_files import write_text


def draw_plots(
    config: Config,
    module: LanguageModel,
    directory: RunDirectory,
    layout: BlockLayout | None,
    rows: list[dict[str, float]],
) -> None:
    """loss.png, loss_by_position.png and, where the pattern does not depend on the input, attention.png.

    Losses are in bits per byte, of a task's symbols in nats; a task has accuracy.png beside them.

    rows  of metrics.csv
    """
    from lightsparse.analysis import curves, pattern_picture  # with matplotlib, at the end of a run

    in_bytes = module.validation is None or module.validation.bytes > 0
    unit: curves.Unit = "bits_per_byte" if in_bytes else "loss"
    curves.save_loss(rows, directory.plots / "loss.png", config.name, unit)
    if config.data.has_answers:
        curves.save_accuracy(rows, directory.plots / "accuracy.png", config.name, config.eval.stop_accuracy)
    context = config.data.context
    ends = [min(FIRST_BUCKET << i, context) for i in range(len(module.by_position))]
    buckets = [
        (start, end, getattr(totals, unit))
        for start, end, totals in zip([0, *ends], ends, module.by_position, strict=False)
        if totals.targets and (totals.bytes or not in_bytes)
    ]
    curves.save_loss_by_position(buckets, directory.plots / "loss_by_position.png", config.name, unit)
    if layout is not None:
        pattern_picture.save(layout, directory.plots / "attention.png", config.name)


def send_pictures(loggers: Sequence[Logger], plots: Path, step: int) -> None:
    """Every PNG of the folder, under its name, to Weights & Biases and TensorBoard; other loggers take none."""
    from matplotlib.image import imread

    pictures = sorted(plots.glob("*.png"))
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for picture in pictures:
                logger.log_image(picture.stem, [str(picture)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            for picture in pictures:
                logger.experiment.add_image(picture.stem, imread(picture), step, dataformats="HWC")
            logger.experiment.close()  # Lightning has closed it once, at the end of the training


def write_sample(config: Config, module: LanguageModel, data: DataModule, directory: RunDirectory) -> None:
    """sample.txt, from the start of the validation text."""
    length, context = config.eval.sample_tokens, config.data.context
    if length == 0:
        return
    module.eval()
    if config.data.has_answers:
        write_text(directory.sample, answers(module.model, data.tokenizer, data.samples.val, length))
        return
    text = data.samples.val[0]["tokens"].tolist()
    if config.objective == "causal":
        sample = continuation(module.model, data.tokenizer, text, context=context, length=length, seed=config.seed)
    else:
        sample = infilling(
            module.model, data.tokenizer, text, context=context, length=length, ratio=config.mlm_ratio, seed=config.seed
        )
    write_text(directory.sample, sample)
