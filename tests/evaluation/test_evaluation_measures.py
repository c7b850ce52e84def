"""Measures on models whose right and wrong answers are known beforehand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.counting import FrequentWords
from lightsparse.data.tasks.mqar import MultiQueryRecall
from lightsparse.data.tasks.passkey import Passkey
from lightsparse.data.tokens import ByteTokenizer
from lightsparse.evaluation.buckets import edges
from lightsparse.evaluation.distance import by_distance
from lightsparse.evaluation.positions import by_position
from lightsparse.evaluation.report import save_heat_map, save_rows
from lightsparse.evaluation.retrieval import retrieval

BYTES = ByteTokenizer()


class Reader:
    """Looks the answers up in the last `window` tokens: right within it, wrong beyond."""

    vocab_size = 8192
    longest = None

    def __init__(self, window: int):
        self.window = window

    def logits(self, tokens_BN: Tensor, asked_BN: Tensor) -> Tensor:
        rows = []
        for tokens_N, asked_N in zip(tokens_BN, asked_BN, strict=True):
            for place in asked_N.nonzero().squeeze(1).tolist():
                logits = torch.zeros(self.vocab_size)
                logits[self.answer(tokens_N, place)] = 100.0
                rows.append(logits)
        return torch.stack(rows)

    def losses(self, tokens_BN: Tensor, labels_BN: Tensor) -> Tensor:
        places = torch.arange(tokens_BN.shape[1]).expand_as(tokens_BN)
        return torch.where(labels_BN == IGNORED, 0.0, 8.0 / (1 + places // self.window))

    def generate(self, tokens_N: Tensor, count: int) -> list[int]:
        text = BYTES.decode(tokens_N[-self.window :])
        key = text.partition("The pass key is ")[2].partition(".")[0]
        return list(f" {key}. And so on."[:count].encode()) if key.isdigit() else list(b" 0 no idea")

    def answer(self, tokens_N: Tensor, place: int) -> int:
        """MQAR's: the token after the key's first occurrence, if that lies within the window."""
        start = max(0, place - self.window)
        found = (tokens_N[start:place] == tokens_N[place]).nonzero().squeeze(1)
        return int(tokens_N[start + int(found[0]) + 1]) if len(found) else 0


def test_buckets_double_and_end_with_the_text():
    assert edges(100) == [16, 32, 64, 100]
    assert edges(16) == [16]
    assert edges(5) == [5]


def test_answers_are_right_up_to_the_reach_and_wrong_beyond():
    samples = MultiQueryRecall(context=256, pairs=8, examples=1).samples(0, 30 * 256).val
    rows = by_distance(Reader(50), samples, reach=50)
    assert sum(row["answers"] for row in rows) == 30 * 8
    assert {row["end"] for row in rows} >= {51, 64}
    for row in rows:
        assert row["accuracy"] == (1.0 if row["end"] <= 51 else 0.0)
        assert row["loss"] == pytest.approx(0.0 if row["end"] <= 51 else 100.0, abs=0.1)


def test_loss_by_position_counts_bytes_of_text_and_leaves_out_what_is_ignored():
    def sample(length: int) -> dict[str, Tensor]:
        labels = torch.full((length,), 65)
        labels[:4] = IGNORED
        return {"tokens": torch.zeros(length, dtype=torch.int64), "labels": labels}

    rows = by_position(Reader(32), [sample(100)] * 3, BYTES.token_bytes())  # type: ignore[arg-type]
    assert [(row["start"], row["end"], row["targets"]) for row in rows] == [
        (0, 16, 36),
        (16, 32, 48),
        (32, 64, 96),
        (64, 100, 108),
    ]
    assert [row["loss"] for row in rows[:3]] == [8.0, 8.0, 4.0]
    assert rows[0]["bits_per_byte"] == pytest.approx(8 / math.log(2))
    symbols = by_position(Reader(32), [sample(20)], torch.zeros(256, dtype=torch.int64))  # type: ignore[arg-type]
    assert symbols[0]["bits_per_byte"] is None


def test_retrieval_finds_what_stands_near_the_end():
    rows = retrieval(Reader(700), Passkey(), lengths=[1000, 2000], depths=[0.0, 1.0], examples=3)
    scores = {(row["length"], row["depth"]): row["score"] for row in rows}
    assert scores == {(1000, 0.0): 0.0, (1000, 1.0): 1.0, (2000, 0.0): 0.0, (2000, 1.0): 1.0}


def test_a_task_without_depth_has_one_row_per_length():
    rows = retrieval(Reader(10), FrequentWords(), lengths=[1000, 1500], depths=[0.0, 1.0], examples=1, generate=False)
    assert [(row["length"], row["depth"], row["score"]) for row in rows] == [(1000, None, None), (1500, None, None)]


def test_whole_examples_are_right_only_with_every_answer():
    task = MultiQueryRecall(pairs=8, examples=1)
    (whole,) = retrieval(Reader(10**6), task, lengths=[128], depths=[0.5], examples=20)
    (partly,) = retrieval(Reader(20), task, lengths=[128], depths=[0.5], examples=20)
    assert whole["accuracy"] == whole["exact_match"] == 1.0
    assert 0 < partly["accuracy"] < 1 and partly["exact_match"] < partly["accuracy"] and partly["score"] is None


def test_rows_and_pictures_are_files(tmp_path: Path):
    rows = [{"length": n, "depth": d, "score": n * d / 4096} for n in (1024, 4096) for d in (0.0, 1.0)]
    files = save_rows(rows, tmp_path / "new" / "passkey", {"name": "a run"})
    assert json.loads(files[0].read_text())["rows"] == rows
    with files[1].open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [0.0, 0.25, 0.0, 1.0]
    assert save_heat_map(rows, "score", tmp_path / "passkey.png", "a run").read_bytes()[:4] == b"\x89PNG"
