"""What a finished run leaves beside its numbers: three plots and a sample of what the model writes."""

from __future__ import annotations

from lightsparse.analysis import curves, pattern_picture
from lightsparse.config import Config
from lightsparse.data.module import DataModule
from lightsparse.files import write_text
from lightsparse.patterns import BlockLayout
from lightsparse.training.directory import RunDirectory
from lightsparse.training.module import FIRST_BUCKET, LanguageModel
from lightsparse.training.sample import continuation, infilling


def draw_plots(
    config: Config,
    module: LanguageModel,
    directory: RunDirectory,
    layout: BlockLayout | None,
    rows: list[dict[str, float]],
) -> None:
    """loss.png, loss_by_position.png and, where the pattern does not depend on the input, attention.png.

    rows  of metrics.csv
    """
    curves.save_loss(rows, directory.plots / "loss.png", config.name)
    context = config.data.context
    ends = [min(FIRST_BUCKET << i, context) for i in range(len(module.by_position))]
    buckets = [
        (start, end, totals.bits_per_byte)
        for start, end, totals in zip([0, *ends], ends, module.by_position, strict=False)
        if totals.bytes
    ]
    curves.save_loss_by_position(buckets, directory.plots / "loss_by_position.png", config.name)
    if layout is not None:
        pattern_picture.save(layout, directory.plots / "attention.png", config.name)


def write_sample(config: Config, module: LanguageModel, data: DataModule, directory: RunDirectory) -> None:
    """sample.txt, from the start of the validation text."""
    length, context = config.eval.sample_tokens, config.data.context
    if length == 0:
        return
    module.eval()
    text = data.samples.val[0]["tokens"].tolist()
    if config.objective == "causal":
        sample = continuation(module.model, data.tokenizer, text, context=context, length=length, seed=config.seed)
    else:
        sample = infilling(
            module.model, data.tokenizer, text, context=context, length=length, ratio=config.mlm_ratio, seed=config.seed
        )
    write_text(directory.sample, sample)
