"""Tasks over symbols: every answer follows from the text by the task's definition, solved here the slow way."""

from __future__ import annotations

import re
from collections import Counter
from statistics import median

import numpy as np
import pytest

from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.induction import InductionHead
from lightsparse.data.tasks.listops import ListOps
from lightsparse.data.tasks.mqar import MultiQueryRecall
from lightsparse.data.tasks.recall import AssociativeRecall
from lightsparse.data.tasks.selective_copy import SelectiveCopy
from lightsparse.data.tasks.task import Example, TaskConfig


def recalled(task: AssociativeRecall, tokens: list[int]) -> dict[int, int]:
    pairs = tokens[len(tokens) % 2 : -2]
    value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return {len(tokens) - 1: value_of[tokens[-1]]}


def induced(task: InductionHead, tokens: list[int]) -> dict[int, int]:
    return {len(tokens) - 1: tokens[tokens.index(tokens[-1]) + 1]}


def recalled_again(task: MultiQueryRecall, tokens: list[int]) -> dict[int, int]:
    head, rest = tokens[: 2 * task.pairs], tokens[2 * task.pairs :]
    value_of = dict(zip(head[::2], head[1::2], strict=True))
    found = {2 * task.pairs + rest.index(key): value for key, value in value_of.items()}
    assert len(found) == task.pairs
    return found


def copied(task: SelectiveCopy, tokens: list[int]) -> dict[int, int]:
    symbols = [token for token in tokens if token > 1]
    return dict(enumerate(symbols, len(tokens) - len(symbols)))


def calculated(task: ListOps, tokens: list[int]) -> dict[int, int]:
    text = task.build_tokenizer().decode(tokens).split("=")[0].strip()
    place = len(text.split())
    rules = {"MIN": min, "MAX": max, "MED": lambda v: int(median(v)), "SM": lambda v: sum(v) % 10}
    while "[" in text:  # innermost first
        text = re.sub(r"\[(\w+) ([\d ]+) \]", lambda m: str(rules[m[1]]([int(v) for v in m[2].split()])), text)
    return {place: int(text)}


CASES = [
    (AssociativeRecall(context=20, vocabulary=10), recalled),
    (AssociativeRecall(context=41, vocabulary=21), recalled),
    (InductionHead(context=30), induced),
    (InductionHead(context=1000, vocabulary=16), induced),
    (MultiQueryRecall(context=64), recalled_again),
    (MultiQueryRecall(context=512, pairs=64, fill="zeros"), recalled_again),
    (SelectiveCopy(context=333), copied),
    (ListOps(context=300, min_length=20, max_length=200, max_depth=4, max_arguments=5), calculated),
    (ListOps(context=2048), calculated),
]


def examples(task: TaskConfig, count: int = 40) -> list[Example]:
    return [task.example(Draws(3, 0, index)) for index in range(count)]


@pytest.mark.parametrize(("task", "solve"), CASES, ids=lambda value: getattr(value, "__name__", type(value).__name__))
def test_the_answers_are_those_of_the_definition(task, solve):
    for example in examples(task):
        assert example.tokens.shape == example.labels.shape == example.evidence.shape == (task.context,)
        assert example.tokens.min() >= 0 and example.tokens.max() < task.vocab_size
        asked = np.flatnonzero(example.evidence >= 0)
        right = solve(task, example.tokens.tolist())
        assert dict(zip(asked.tolist(), example.labels[asked].tolist(), strict=True)) == right
        assert (example.evidence[asked] <= asked).all()  # it stands in the text


@pytest.mark.parametrize("task", [case[0] for case in CASES[:7]], ids=lambda task: type(task).__name__)
def test_evidence_is_where_the_answer_stands(task):
    """The label of each answer is written at the evidence or right behind it."""
    for example in examples(task, 10):
        for place in np.flatnonzero(example.evidence >= 0):
            start = place - example.evidence[place]
            assert example.labels[place] in example.tokens[start : start + 2]


@pytest.mark.parametrize("task", [task for task, solve in CASES if solve in (recalled, recalled_again)])
def test_evidence_is_the_nearest_place_of_the_same_key(task):
    for example in examples(task, 10):
        for place in np.flatnonzero(example.evidence >= 0):
            start = place - example.evidence[place]
            end = 2 * task.pairs if isinstance(task, MultiQueryRecall) else task.context - 2
            keys = range(task.context % 2 if isinstance(task, AssociativeRecall) else 0, end, 2)
            assert start == max(at for at in keys if example.tokens[at] == example.tokens[place])


def test_every_next_token_is_a_label_where_the_training_may_ask_for_all():
    for task in (AssociativeRecall(context=20, vocabulary=10), InductionHead(context=30)):
        example = task.example(Draws(0, 0, 0))
        assert example.labels[:-1].tolist() == example.tokens[1:].tolist()


def test_guessing_a_value_is_right_in_a_quarter_of_the_easier_recall():
    values = [e.labels[-1] for e in examples(AssociativeRecall(context=20, vocabulary=10), 2000)]
    assert set(values) == {4, 5, 6, 7}
    assert max(Counter(values).values()) < 0.3 * len(values)


def test_questions_of_mqar_stand_near_the_pairs_by_a_power_law():
    task = MultiQueryRecall(context=512, pairs=1)
    gaps = np.array([np.flatnonzero(e.evidence >= 0)[0] - 1 for e in examples(task, 1000)])
    weights = np.arange(1, 511) ** (0.01 - 1)
    expected = np.cumsum(weights / weights.sum())
    for gap in (1, 8, 64):
        assert np.mean(gaps <= gap) == pytest.approx(expected[gap - 1], abs=0.05)


def test_listops_keeps_its_lengths_and_uses_every_operator():
    task = ListOps(context=2048)
    texts = [task.build_tokenizer().decode(e.tokens) for e in examples(task, 8)]
    assert all(500 < text.split().index("=") < 2000 for text in texts)
    assert {word for word in texts[0].split() if word[0] == "["} == {"[MIN", "[MAX", "[MED", "[SM"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MultiQueryRecall(context=10, pairs=4), "data.context is 10 and data.pairs 4"),
        (lambda: MultiQueryRecall(vocabulary=8, pairs=4), "data.vocabulary is 8"),
        (lambda: MultiQueryRecall(loss="all"), "data.loss is all"),
        (lambda: SelectiveCopy(context=31), "raise data.context"),
        (lambda: ListOps(context=1000), "data.max_length 2000"),
        (lambda: ListOps(context=2048, max_depth=2, max_arguments=5), "no expression has more than 37 tokens"),
        (lambda: InductionHead(vocabulary=1), "data.vocabulary is 1"),
        (lambda: AssociativeRecall(examples=0), "data.examples is 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_mask_labels_say_that_nothing_is_asked():
    example = MultiQueryRecall(context=64).example(Draws(0, 0, 0))
    assert ((example.labels == IGNORED) == (example.evidence < 0)).all()
