"""The plots of a finished run, sent to the loggers that show pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


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
