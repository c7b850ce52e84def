"""Examples as samples: a function of seed, split and index alone, and as the training loop expects them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightsparse.data.module import DataModule
from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.mqar import MultiQueryRecall
from lightsparse.data.tasks.recall import AssociativeRecall
from lightsparse.data.tasks.symbols import SymbolTokenizer
from lightsparse.data.tasks.task import TaskSamples

TASK = AssociativeRecall(context=20, vocabulary=10, examples=50, loss="all")


def test_a_sample_is_the_same_in_whatever_order_it_is_asked_for():
    forth, back = TASK.samples(7, 400), TASK.samples(7, 400)
    there = [forth.train[i] for i in range(50)]
    here = [back.train[i] for i in reversed(range(50))][::-1]
    for one, other in zip(there, here, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_epoch_gives_the_same_examples_under_ids_of_its_own():
    train = TASK.samples(7, 400).train
    first, second = train[3], train[53]
    assert torch.equal(first["tokens"], second["tokens"])
    assert (first["sample_ids"].item(), second["sample_ids"].item()) == (3, 53)


def test_training_and_validation_share_no_example():
    task = MultiQueryRecall(context=32, examples=300)
    samples = task.samples(0, 300 * 32)
    train = {tuple(samples.train[i]["tokens"].tolist()) for i in range(300)}
    val = {tuple(samples.val[i]["tokens"].tolist()) for i in range(300)}
    assert len(train) == len(val) == 300 and not train & val


def test_another_seed_draws_another_set():
    assert TASK.samples(0, 400).manifest != TASK.samples(1, 400).manifest
    assert not torch.equal(TASK.samples(0, 400).train[0]["tokens"], TASK.samples(1, 400).train[0]["tokens"])


def test_the_digest_does_not_depend_on_how_samples_are_loaded():
    other = AssociativeRecall(context=20, vocabulary=10, examples=50, loss="all", batch_size=8, num_workers=2)
    assert TASK.samples(0, 400).manifest == other.samples(0, 400).manifest


def test_training_may_ask_for_every_token_and_validation_asks_for_answers():
    samples = TASK.samples(0, 400)
    assert len(samples.val) == 20
    assert (samples.train[0]["labels"] != IGNORED).all()
    assert (samples.val[0]["labels"] != IGNORED).nonzero().squeeze(1).tolist() == [19]
    assert (samples.val[20]["labels"] == IGNORED).all()  # past the end: nothing is asked


def test_labels_may_be_edited_without_touching_the_kept_example():
    train = TASK.samples(0, 400).train
    before = train[0]["labels"].clone()
    train[0]["labels"].fill_(IGNORED)
    assert torch.equal(train[0]["labels"], before)


def test_a_set_too_large_to_keep_is_drawn_anew(monkeypatch):
    kept = TaskSamples(TASK, 0, 0, 50)
    monkeypatch.setattr("lightsparse.data.tasks.task._KEPT", 0)
    fresh = TaskSamples(TASK, 0, 0, 50)
    for _ in range(2):
        assert torch.equal(kept[4]["tokens"], fresh[4]["tokens"])
    assert not fresh._drawn


def test_batches_of_the_data_module_hold_the_evidence():
    task = MultiQueryRecall(context=32, examples=100, batch_size=4)
    batch = next(iter(DataModule(task, 0, 320).train_dataloader()))
    assert batch["tokens"].shape == batch["evidence"].shape == (4, 32)
    assert ((batch["evidence"] >= 0) == (batch["labels"] != IGNORED)).all()


def test_draws_are_uniform_distinct_and_weighted():
    draws = Draws(0, 0, 0)
    assert np.bincount(draws.below(4, 8000), minlength=4) == pytest.approx([2000] * 4, rel=0.1)
    for limit, count in ((10, 10), (1000, 5), (16, 3)):
        found = Draws(0, 0, limit).distinct(limit, count)
        assert len(set(found.tolist())) == count and found.min() >= 0 and found.max() < limit
    firsts = [Draws(1, 0, i).weighted(np.array([1.0, 3.0]), 1)[0] for i in range(2000)]
    assert np.mean(firsts) == pytest.approx(0.75, abs=0.03)


def test_symbols_are_written_and_read_again():
    tokenizer = SymbolTokenizer(5, ("a", "b"))
    assert tokenizer.decode([0, 1, 4]) == "a b 4"
    assert tokenizer.encode("a b 4").tolist() == [0, 1, 4]
    assert tokenizer.token_bytes().sum() == 0
    with pytest.raises(ValueError, match="'7' is none of this task's 5 symbols"):
        tokenizer.encode("a 7")
