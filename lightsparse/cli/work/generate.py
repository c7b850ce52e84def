"""What `lightsparse generate` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightsparse.cli.words import console
from lightsparse.config.targets import ConfigError
from lightsparse.models.sampling import Sampling
from lightsparse.models.text_stream import document_of, stream_texts
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.utils.text import count_text


def generate(
    *,
    run: str,
    step: int | None,
    prompt: str | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: Sequence[str],
) -> Iterator[str]:
    """What `written` gives, after what `about` says on stderr; by the words of `lightsparse generate`."""
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    trained, prompts = load_run(run, step), prompts or [prompt or ""]
    for line in about(trained, run, prompts, max_new_tokens):
        console(stderr=True).print(line)
    yield from written(trained, prompts, max_new_tokens, sampling, seed, stop)


def about(run: TrainedRun, folder: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What writes, and whether it is asked for more than it was trained for. Raises ConfigError where it cannot."""
    config = run.config
    if config.objective != "causal":
        raise ConfigError(
            f"run is {folder}, trained with objective={config.objective}, which reads both ways and writes no "
            "text; name a run with objective=causal"
        )
    parameters = count_text(sum(parameter.numel() for parameter in run.model.parameters()))
    lines = [f"{folder} · step {run.step} · {config.attention.name} · {parameters} parameters"]
    longest = max(len(document_of(run.tokenizer, prompt)) for prompt in prompts)
    if longest + max_new_tokens > config.data.context:
        lines.append(
            f"the text may reach {longest + max_new_tokens} tokens and the model was trained on "
            f"data.context={config.data.context}; what comes after them is beyond what it knows"
        )
    return lines


def written(
    run: TrainedRun, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
) -> Iterator[str]:
    """Prompts and continuations as they come, one text after the other: a later one waits for those before it."""
    model = run.model.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    heads = [f"════ {row + 1} ════\n{prompt}" if len(prompts) > 1 else prompt for row, prompt in enumerate(prompts)]
    waiting, shown, over = list(heads), 0, [False] * len(prompts)
    steps = stream_texts(
        model,
        run.tokenizer,
        [document_of(run.tokenizer, prompt) for prompt in prompts],
        max_new_tokens,
        sampling=sampling,
        generator=generator,
        stop=stop,
    )
    yield waiting[0]
    waiting[0] = ""
    for pieces in steps:
        for row, piece in enumerate(pieces):
            waiting[row] += piece or ""
            over[row] = piece is None
        while shown < len(prompts):
            yield waiting[shown]
            waiting[shown] = ""
            if not over[shown]:
                break
            yield "\n"
            shown += 1
    for rest in waiting[shown:]:
        yield rest + "\n"
