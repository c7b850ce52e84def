"""Recall in a stream: answers by looking back, distances as promised, and no place from which an answer leaks."""

import numpy as np
import pytest

from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.recall_stream import RecallStream

CASES = [
    RecallStream(context=512),
    RecallStream(context=512, nearest=2),
    RecallStream(context=301, vocabulary=41, pairs=20, nearest=31),  # odd everywhere
    RecallStream(context=64, vocabulary=8, pairs=4, nearest=8),  # one order, again and again
]


def examples(task, count=20):
    return [task.example(Draws(3, 0, index)) for index in range(count)]


@pytest.mark.parametrize("task", CASES, ids=lambda task: f"{task.context}-{task.pairs}-{task.nearest}")
def test_an_answer_is_what_followed_the_key_the_last_time(task):
    for example in examples(task):
        tokens = example.tokens.tolist()
        assert len(tokens) == len(example.labels) == task.context
        for place in range(task.context):
            before = [at for at in range(place) if tokens[at] == tokens[place]]
            asked = place % 2 == 0 and bool(before)
            assert (example.evidence[place] >= 0) == asked
            if asked:
                assert example.labels[place] == tokens[before[-1] + 1]
                assert example.evidence[place] == place - before[-1]


@pytest.mark.parametrize("task", CASES, ids=lambda task: f"{task.context}-{task.pairs}-{task.nearest}")
def test_no_answer_is_nearer_than_promised_and_some_are_that_near(task):
    distances = np.concatenate([example.evidence[example.evidence >= 0] for example in examples(task)])
    assert distances.min() == task.nearest + task.nearest % 2  # a pair has two tokens
    if task.nearest < 2 * task.pairs:
        assert distances.max() > 1.5 * task.nearest


@pytest.mark.parametrize("task", CASES, ids=lambda task: f"{task.context}-{task.pairs}-{task.nearest}")
def test_keys_and_values_keep_to_their_halves_and_a_key_to_its_value(task):
    half = task.vocabulary // 2
    for example in examples(task):
        keys, values = example.tokens[::2], example.tokens[1::2]
        assert keys.max() < half <= values.min() and values.max() < task.vocabulary
        assert len(set(keys.tolist())) <= task.pairs
        assert len(set(zip(keys.tolist(), values.tolist(), strict=False))) == len(set(keys[: len(values)].tolist()))


def test_labels_are_the_text_itself_to_its_last_token():
    for task in CASES:
        for example in examples(task, 3):
            assert (example.labels[:-1] == example.tokens[1:]).all() and example.labels[-1] != IGNORED


def test_a_long_text_asks_again_what_a_short_one_does():
    short, long = (RecallStream(context=context).example(Draws(0, 0, 5)) for context in (256, 1024))
    assert (short.evidence >= 0).sum() >= 64 and (long.evidence >= 0).sum() == 512 - 64
    assert (short.tokens != long.tokens[:256]).sum() == 0  # the same stream, cut elsewhere


def test_easier_examples_are_for_training_alone_and_keep_the_rules():
    task = RecallStream(context=512, fewest=4)
    samples = task.samples(0, 20 * 512)
    keys = [len(set(samples.train[i]["tokens"][::2].tolist())) for i in range(100)]
    assert min(keys) < 8 and max(keys) > 48 and 12 < np.median(keys) < 24  # log-uniform: its median is 16
    for i, count in enumerate(keys):
        evidence = samples.train[i]["evidence"]
        assert evidence[evidence >= 0].min() >= 1.4 * count
    plain = RecallStream(context=512).samples(0, 20 * 512).val
    for i in range(20):
        assert (samples.val[i]["tokens"] == plain[i]["tokens"]).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pairs": 0, "nearest": 2}, "data.pairs is 0"),
        ({"pairs": 65}, "data.vocabulary is 128"),
        ({"nearest": 129}, "data.nearest is 129"),
        ({"nearest": 1}, "data.nearest is 1"),
        ({"context": 223}, "data.context is 223"),
        ({"fewest": 65}, "data.fewest is 65"),
    ],
)
def test_what_cannot_be_is_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        RecallStream(**({"context": 512} | fields))
    assert "\n" not in str(error.value)
