"""sample.txt: what the trained model writes after a piece of validation text, or (mlm) in its gaps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lightsparse.data.source import IGNORED, SampleSet
from lightsparse.data.tokens import Tokenizer
from lightsparse.models.generation import generate
from lightsparse.models.sampling import Sampling
from lightsparse.models.text_stream import text_after
from lightsparse.models.transformer import Transformer, context_for
from lightsparse.training.objectives import hiding_chance

_LONGEST_PROMPT = 512  # tokens


def continuation(
    model: Transformer, tokenizer: Tokenizer, text: Sequence[int], *, context: int, length: int, seed: int
) -> str:
    """A prompt from the start of `text` (token ids) and `length` sampled tokens after it, a rule between them.

    Prompt and continuation stay within `context`; the continuation ends early with its document.
    """
    length = min(length, context - 1)
    prompt = list(text[: min(_LONGEST_PROMPT, context - length)])
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    sampling = Sampling(temperature=0.8, top_k=40)
    (written,) = generate(model, [prompt], length, sampling=sampling, generator=generator, stop_tokens=(tokenizer.bos,))
    return _sections(
        ("prompt (validation text)", _text(tokenizer, torch.tensor(prompt))),
        ("continuation (the model, temperature 0.8, top 40)", text_after(tokenizer, prompt, written)),
    )


@torch.no_grad()
def infilling(
    model: Transformer,
    tokenizer: Tokenizer,
    text: Sequence[int],
    *,
    context: int,
    length: int,
    ratio: float,
    seed: int,
) -> str:
    """The first `length` tokens of `text` with a share `ratio` hidden (shown as ▒), and the model's guesses there."""
    tokens = torch.tensor([list(text[: min(length, context)])], device=model.head_weight.device)
    hidden = hiding_chance(seed, torch.zeros(1, dtype=torch.int64, device=tokens.device), tokens.shape[1]) < ratio
    assert tokenizer.mask is not None  # as training has checked
    read = tokens.masked_fill(hidden, tokenizer.mask)
    guesses = model.logits(model(read, context_for(read)).hidden).argmax(-1)
    seen: list[int] = []
    parts = []
    for masked, tokens_of_run in groupby(read[read != tokenizer.bos].tolist(), tokenizer.mask.__eq__):
        run = list(tokens_of_run)
        parts.append("▒" * len(run) if masked else text_after(tokenizer, seen, run))
        seen += [] if masked else run
    return _sections(
        ("validation text with hidden tokens", "".join(parts)),
        ("filled in by the model", _text(tokenizer, torch.where(hidden, guesses, tokens)[0])),
    )


@torch.no_grad()
def answers(model: Transformer, tokenizer: Tokenizer, samples: SampleSet, length: int) -> str:
    """The first three examples: the last `length` tokens up to the first question, what is right, what the model says.

    Answers of several tokens are given one by one, each after the right ones before it.
    """
    sections = []
    for index in range(min(3, len(samples))):
        tokens_N, labels_N = (samples[index][name].to(model.head_weight.device) for name in ("tokens", "labels"))
        asked_N = (labels_N != IGNORED).nonzero().squeeze(1)
        hidden = model(tokens_N[None], context_for(tokens_N[None])).hidden[0]
        first = int(asked_N[0]) + 1
        prompt = tokens_N[max(0, first - length) : first].tolist()
        sections += [
            (f"example {index + 1}", tokenizer.decode(prompt)),
            ("right", text_after(tokenizer, prompt, labels_N[asked_N].tolist())),
            ("the model", text_after(tokenizer, prompt, model.logits(hidden[asked_N]).argmax(-1).tolist())),
        ]
    return _sections(*sections)


def _sections(*parts: tuple[str, str]) -> str:
    return "".join(f"════ {title} ════\n{text}\n" for title, text in parts)


def _text(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The text without the marks of document starts."""
    return tokenizer.decode(tokens[tokens != tokenizer.bos].cpu())
