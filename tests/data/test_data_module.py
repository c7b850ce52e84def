from itertools import islice

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightsparse.data.files import FilesData
from lightsparse.data.module import DataModule
from lightsparse.data.source import IGNORED, DataError

KEYS = {"tokens", "labels", "documents", "positions", "sample_ids"}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text("".join(map(chr, rng.integers(97, 123, 40 + 7 * i))))
    return tmp_path / "texts"


def module(folder, seed=0, eval_tokens=500, **fields):
    config = FilesData(path=str(folder), **{"context": 33, "batch_size": 3, "val_fraction": 0.4, **fields})
    return DataModule(config, seed, eval_tokens)


def batches(data, count):
    return list(islice(data.train_dataloader(), count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == KEYS
        for key in KEYS:
            assert torch.equal(a[key], b[key])


class Ranked:
    """What the data module asks of a trainer."""

    def __init__(self, rank, world):
        self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world}


@pytest.mark.parametrize("pack", ["isolate", "concat"])
def test_batches_have_the_agreed_keys_shapes_and_types(folder, pack):
    batch = batches(module(folder, pack=pack), 1)[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((3, 33), torch.int64),
        "labels": ((3, 33), torch.int64),
        "documents": ((3, 33), torch.int32),
        "positions": ((3, 33), torch.int64),
        "sample_ids": ((3,), torch.int64),
    }
    assert bool(batch["documents"].any()) == (pack == "isolate")


def test_workers_change_nothing(folder):
    assert_same(batches(module(folder), 12), batches(module(folder, num_workers=2), 12))


@pytest.mark.parametrize("done, batch_size", [(1, 3), (7, 3), (40, 3), (6, 2)])
def test_a_continued_run_sees_the_very_samples_of_an_uninterrupted_one(folder, done, batch_size):
    whole = batches(module(folder, batch_size=batch_size), done + 10)
    first = module(folder, batch_size=batch_size)
    first.consumed = done * batch_size
    second = module(folder, batch_size=batch_size)
    second.load_state_dict(first.state_dict())
    assert_same(batches(second, 10), whole[done:])


def test_the_samples_of_a_step_do_not_depend_on_ranks_or_micro_batches(folder):
    alone = torch.cat([batch["sample_ids"] for batch in batches(module(folder, batch_size=4), 6)])
    ranks = [module(folder, batch_size=2) for _ in range(2)]
    for rank, data in enumerate(ranks):
        data.trainer = Ranked(rank, 2)
    pairs = zip(*(batches(data, 6) for data in ranks), strict=True)
    together = [torch.cat([a["sample_ids"], b["sample_ids"]]) for a, b in pairs]
    assert [set(step.tolist()) for step in together] == [set(step.tolist()) for step in alone.split(4)]


def test_two_one_four_and_two_ranks_in_turn_keep_the_global_order(folder):
    """Three steps of four samples on each number of ranks, continued from the state before."""
    alone = torch.cat([batch["sample_ids"] for batch in batches(module(folder, batch_size=4), 12)]).split(4)
    state, seen = module(folder).state_dict(), []
    for world in (2, 1, 4, 2):
        per_rank = []
        for rank in range(world):
            data = module(folder, batch_size=1)
            data.trainer = Ranked(rank, world)
            data.load_state_dict(state)
            per_rank.append(torch.cat([batch["sample_ids"] for batch in batches(data, 3 * 4 // world)]))
        steps = [torch.cat(parts) for parts in zip(*(ids.split(4 // world) for ids in per_rank), strict=True)]
        seen += steps
        state = {**state, "consumed": state["consumed"] + 12}
    assert [set(step.tolist()) for step in seen] == [set(step.tolist()) for step in alone]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_count_the_first_validation_tokens_once_in_equally_many_batches(folder, world):
    ranks = [module(folder, eval_tokens=250, batch_size=1) for _ in range(world)]
    for rank, data in enumerate(ranks):
        data.trainer = Ranked(rank, world)
    per_rank = [list(data.val_dataloader()) for data in ranks]
    assert len({len(found) for found in per_rank}) == 1
    in_order = [batch["labels"][0] for step in zip(*per_rank, strict=True) for batch in step]
    counted = torch.cat(in_order)
    counted = counted[counted != IGNORED]
    assert counted.tolist() == ranks[0].samples.val.stream[1:251].tolist()


def test_a_short_validation_stream_is_used_whole(folder):
    data = module(folder, eval_tokens=10**9)
    labels = torch.cat([batch["labels"].flatten() for batch in data.val_dataloader()])
    assert (labels != IGNORED).sum() == len(data.samples.val.stream) - 1


def test_loading_draws_nothing_from_the_global_generator(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = module(folder)
    batches(data, 3), next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fields", [{"context": 32}, {"pack": "concat"}, {"val_fraction": 0.5}], ids=str)
def test_other_packing_is_another_fingerprint_and_is_not_continued(folder, fields):
    saved = module(folder).state_dict()
    other = module(folder, **fields)
    with pytest.raises(DataError) as refusal:
        other.load_state_dict(saved)
    assert saved["fingerprint"] in str(refusal.value) and other.fingerprint in str(refusal.value)


def test_what_only_changes_the_speed_keeps_the_fingerprint(folder):
    assert module(folder).fingerprint == module(folder, batch_size=1, num_workers=2, eval_tokens=9, seed=5).fingerprint


def test_other_text_or_another_seed_is_not_continued(folder):
    saved = module(folder).state_dict()
    with pytest.raises(DataError, match="with seed 0, this run has 1"):
        module(folder, seed=1).load_state_dict(saved)
    (folder / "0.txt").write_text("something else entirely")
    with pytest.raises(DataError, match="with fingerprint"):
        module(folder).load_state_dict(saved)


class Recorder(pl.LightningModule):
    """Trains nothing; keeps the sample ids it saw, and sets the data's counter as the real training module does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch["sample_ids"].tolist())
        return (self.weight * 0).sum()

    def on_before_optimizer_step(self, optimizer):
        self.trainer.datamodule.consumed = (self.global_step + 1) * self.trainer.datamodule.config.batch_size

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def fit(folder, root, steps, resume=None):
    recorder, data = Recorder(), module(folder)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, default_root_dir=root, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(root / "last.ckpt")
    return recorder.seen


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_lightning_run_resumed_from_its_checkpoint_sees_what_it_had_not_seen(folder, tmp_path):
    whole = fit(folder, tmp_path, 9)
    first = fit(folder, tmp_path, 4)
    rest = fit(folder, tmp_path, 9, resume=tmp_path / "last.ckpt")
    assert first + rest == whole
