"""Let a trained run write: the text streams to the terminal as it comes.

    lightsparse generate run=runs/<name> prompt="def main("
    lightsparse generate run=runs/<name> 'prompts=["Once upon", "The end"]' max_new_tokens=100 temperature=0

  run=FOLDER          a run directory; its newest whole checkpoint writes
  step=N              the checkpoint of that step instead
  prompt=TEXT         the beginning of a document, taken literally (default: nothing)
  prompts=[…]         several, in one batch; a YAML list
  max_new_tokens=200  tokens per prompt, at most; a text also ends with its document
  temperature=0.8     0 takes the likeliest token each time
  top_k=40            draw among the 40 likeliest tokens; null: all
  top_p=0.95          then among the fewest that hold this share of the probability; null: all
  seed=0              of the draws
  stop=TEXT           a text ends before this string; stop=["\\n\\n","def "] for several, a YAML list
The text goes to the standard output, everything else to the standard error. Uses CUDA where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from lightsparse.config.targets import ConfigError
from lightsparse.config.typed import typed
from lightsparse.models.sampling import Sampling
from lightsparse.models.text_stream import document_of, stream_texts
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.utils.text import count_text

LITERAL = ("run", "prompt")  # whatever stands behind the = is the value


@dataclass(frozen=True)
class Options:
    """The command line; see the module's docstring."""

    run: str
    prompt: str | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float | None = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()
    step: int | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts:
            raise ValueError("prompt and prompts are both given; put all of them into prompts=[…]")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2⁶³)")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which ends every text at once; leave it out")
        self.sampling  # noqa: B018  raises where a value is out of range

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def all_prompts(self) -> tuple[str, ...]:
        return self.prompts or (self.prompt or "",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write; returns the exit code: 0, 2 after the one sentence that says what is wrong, or 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    if {"-h", "--help"} & set(given):
        console.print(__doc__, markup=False, highlight=False)
        return 0
    try:
        options = parse(given)
        run = load_run(options.run, options.step)
        for line in about(run, options):
            errors.print(line, markup=False, highlight=False)
        for piece in written(run, options):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except ConfigError as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return 130
    return 0


def parse(words: Sequence[str]) -> Options:
    """The options of `key=value` words. Raises ConfigError."""
    node: dict[str, Any] = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ConfigError(f"{word} is not an option; write key=value, a text with spaces in quotes")
        if key in LITERAL:
            node[key] = value
        elif key == "stop" and not value.startswith("["):
            node[key] = [value]
        else:
            node |= _from_yaml(word)
    if "run" not in node:
        raise ConfigError("run is missing; name a run directory: run=runs/<name>")
    return typed(Options, node, "")


def about(run: TrainedRun, options: Options) -> list[str]:
    """What writes, and whether it is asked for more than it was trained for. Raises ConfigError where it cannot."""
    config = run.config
    if config.objective != "causal":
        raise ConfigError(
            f"run is {options.run}, trained with objective={config.objective}, which reads both ways and writes no "
            "text; name a run with objective=causal"
        )
    parameters = count_text(sum(parameter.numel() for parameter in run.model.parameters()))
    lines = [f"{options.run} · step {run.step} · {config.attention.name} · {parameters} parameters"]
    longest = max(len(document_of(run.tokenizer, prompt)) for prompt in options.all_prompts)
    if longest + options.max_new_tokens > config.data.context:
        lines.append(
            f"the text may reach {longest + options.max_new_tokens} tokens and the model was trained on "
            f"data.context={config.data.context}; what comes after them is beyond what it knows"
        )
    return lines


def written(run: TrainedRun, options: Options) -> Iterator[str]:
    """Prompts and continuations as they come, one text after the other: a later one waits for those before it."""
    prompts = options.all_prompts
    model = run.model.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(model.head_weight.device).manual_seed(options.seed)
    heads = [f"════ {row + 1} ════\n{prompt}" if len(prompts) > 1 else prompt for row, prompt in enumerate(prompts)]
    waiting, shown, over = list(heads), 0, [False] * len(prompts)
    steps = stream_texts(
        model,
        run.tokenizer,
        [document_of(run.tokenizer, prompt) for prompt in prompts],
        options.max_new_tokens,
        sampling=options.sampling,
        generator=generator,
        stop=options.stop,
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


def _from_yaml(word: str) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"""{word} cannot be read as YAML; write a list as 'key=["a", "b"]'""") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
