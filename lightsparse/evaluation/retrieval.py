"""Retrieval by length and depth: the share of right answers over a grid of context lengths and places of the needle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import VAL, TaskConfig, TaskSamples
from lightsparse.data.tasks.text_task import TextTask
from lightsparse.evaluation.distance import batches
from lightsparse.evaluation.subject import Subject
from lightsparse.models.text_stream import text_after


def retrieval(
    subject: Subject,
    task: TaskConfig,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    seed: int = 0,
    generate: bool = True,
) -> list[dict[str, Any]]:
    """One row per length and depth: length, depth, examples, accuracy, exact_match, score.

    depths       shares of the text before what is asked; a task without depth has one row per length, its depth None
    examples     of each row, those of validation under `seed`; the same whatever the depth
    accuracy     share of answer tokens that are the likeliest after the right ones before
    exact_match  share of examples with all of them: what greedy decoding would write
    score        the task's own metric on generated text, mean over examples; None where the task is no text or not
                 generate
    """
    rows = []
    for length in lengths:
        for depth in depths if _has_depth(task) else [None]:
            here = replace(task, context=length)
            if isinstance(here, TextTask):
                here = replace(here, depth=depth)
            rows.append(
                {"length": length, "depth": depth, "examples": examples}
                | _answers(subject, TaskSamples(here, seed, VAL, examples))
                | {"score": _score(subject, here, seed, examples) if generate and isinstance(here, TextTask) else None}
            )
    return rows


def _has_depth(task: TaskConfig) -> bool:
    return isinstance(task, TextTask) and task.has_depth


def _answers(subject: Subject, samples: TaskSamples) -> dict[str, float]:
    right = answers = exact = 0
    for batch in batches(samples):
        asked_BN = batch["labels"] != IGNORED
        right_BN = torch.zeros_like(asked_BN)
        right_BN[asked_BN] = subject.logits(batch["tokens"], asked_BN).argmax(-1).cpu() == batch["labels"][asked_BN]
        right, answers = right + int(right_BN.sum()), answers + int(asked_BN.sum())
        exact += int((right_BN.sum(1) == asked_BN.sum(1)).sum())
    return {"accuracy": right / answers, "exact_match": exact / len(samples)}


def _score(subject: Subject, task: TextTask, seed: int, examples: int) -> float:
    tokenizer, total = task.build_tokenizer(), 0.0
    for index in range(examples):
        question = task.question(Draws(seed, VAL, index))
        written = subject.generate(torch.from_numpy(question.prompt), task.new_tokens(question))
        total += task.score(text_after(tokenizer, question.prompt.tolist(), written), question.references)
    return total / examples
