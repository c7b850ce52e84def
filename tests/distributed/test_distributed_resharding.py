"""Another number of ranks at every restart, the same training: the global batch is what a run is, not who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankPool, pool_fixture
from rank_runs import fitted, words

from lightsparse.distributed.sharded_files import damage_of_folder
from lightsparse.training.checkpoints.files import checkpoint_path, checkpoint_steps, damage_of, read_checkpoint

two, four = pool_fixture(2, timeout=240.0), pool_fixture(4, timeout=240.0)
TIMED = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}
# Dropout, too: a sample keeps its randomness on whichever rank and in whichever micro-batch it is read.
COMMON = (
    *("trainer.global_batch=4", "data.batch_size=1", "attention.dropout=0.2"),
    *("schedule=constant", "optimizer=adamw"),
)

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def one() -> Iterator[RankPool]:
    with RankPool(1, 240.0) as pool:
        yield pool


def run(pool: RankPool, folder: Path, *more: str) -> list[dict[str, float]]:
    rows = pool.run(fitted, words(folder, *COMMON, "eval.every_n_steps=5", *more))[0][1]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def whole(one: RankPool, folder: Path) -> list[dict[str, float]]:
    return run(one, folder, "name=whole")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_one_four_and_two_ranks_in_turn_have_the_curve_of_one(
    kind: str, one: RankPool, two: RankPool, four: RankPool, folder: Path, whole: list[dict[str, float]]
) -> None:
    rows: list[dict[str, float]] = []
    for stage, pool in enumerate((two, one, four, two), start=1):
        strategy = f"strategy={kind}" if pool is not one else "strategy=single"
        rows = run(pool, folder, f"name={kind}", strategy, f"trainer.max_steps={5 * stage}")
        path = checkpoint_path(folder / "runs" / kind / "checkpoints", 5 * stage)
        assert path.is_dir() == (kind == "fsdp" and pool is not one) and damage_of(path) is None
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for ours, theirs in zip(rows, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), ours["step"]
    paths = (checkpoint_path(folder / "runs" / name / "checkpoints", 20) for name in (kind, "whole"))
    moved, still = (read_checkpoint(path) for path in paths)
    assert moved["DataModule"] == still["DataModule"] and moved["DataModule"]["consumed"] == 80


def test_another_global_batch_is_refused(two: RankPool, folder: Path, whole: list[dict[str, float]]) -> None:
    with pytest.raises(AssertionError, match="samples per optimizer step: 4 there, 8 here"):
        run(two, folder, "name=whole", "strategy=ddp", "trainer.global_batch=8", "trainer.max_steps=30")


def test_a_damaged_folder_is_named_and_the_one_before_is_taken(two: RankPool, folder: Path) -> None:
    """A bit flipped in each file in turn, each file missing in turn, and a .metadata that names what is no data."""
    more = ("name=damaged", "strategy=fsdp", "checkpoint.every_n_steps=2", "checkpoint.keep_best=false")
    run(two, folder, *more, "trainer.max_steps=4", "checkpoint.keep=2")
    steps = checkpoint_steps(folder / "runs" / "damaged" / "checkpoints")
    assert list(steps) == [2, 4] and all(damage_of(path) is None for path in steps.values())
    newest, wrong = steps[4], 0
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        file.write_bytes(flipped)
        wrong += damage_of(newest) is not None
        file.unlink()
        wrong += damage_of(newest) is not None
        file.write_bytes(whole)
    assert wrong == 2 * len(list(newest.iterdir())) and damage_of_folder(newest) is None
    (newest / "rest.pt").unlink()
    rows = run(two, folder, *more, "trainer.max_steps=6")
    assert [row["step"] for row in rows] == list(range(7))
    assert damage_of(steps[4]) is None  # trained and written again


def _shards_of_other_kinds(rank: int, world: int, path: str) -> list[tuple[str, Any]]:
    """Save a small model's state in the background while it changes; what comes back split, and whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lightsparse.distributed import sharded_files

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()
    fully_shard(model, mesh=mesh)
    tree = {"state_dict": dict(model.state_dict()), "steps": [3, {"seen": torch.arange(2)}]}
    wanted = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
    rest, shards = sharded_files.separated(tree, lambda keys: keys[1])
    group = dist.new_group(backend="gloo")
    future = sharded_files.start_writing(Path(path), shards, group, background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    future.result()
    if rank == 0:
        sharded_files.finish_writing(Path(path), rest)
    dist.barrier()
    split, alone = sharded_files.read(Path(path), model.state_dict()), sharded_files.read(Path(path))
    assert split["steps"][0] == alone["steps"][0] == 3 and torch.equal(alone["steps"][1]["seen"], torch.arange(2))
    same = []
    for name, value in wanted.items():
        same.append((name, torch.equal(split["state_dict"][name].full_tensor(), value)))
        same.append((name, torch.equal(alone["state_dict"][name], value)))
    return same


def test_shards_hold_the_state_at_the_call_and_come_back_split_or_whole(two: RankPool, tmp_path: Path) -> None:
    for same in two.run(_shards_of_other_kinds, str(tmp_path / "folder")):
        assert len(same) == 8 and all(good for _, good in same), same
