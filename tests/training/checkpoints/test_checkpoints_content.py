"""A real checkpoint of either kind holds the keys that the package's docstring lists, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import RankPool
from rank_runs import fitted, words

from lightsparse.training import checkpoints
from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint

pytestmark = pytest.mark.multiprocess

TABLE = checkpoints.__doc__.partition("what it is\n")[2]
ROWS = dict(re.findall(r"^(\S+)(.*)$", TABLE, re.MULTILINE))
SOMETIMES = {key for key, row in ROWS.items() if "; only w" in row}


@pytest.fixture(scope="module")
def rank() -> Iterator[RankPool]:
    with RankPool(1, 240.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("line", "more", "is_folder"),
    [
        (("strategy=single",), set(), False),
        (("strategy=ddp", "strategy.comm_hook=topk"), {"residuals"}, False),
        (("strategy=fsdp", "attention=moba", "~attention.window", "attention.block=16"), {"choices"}, True),
    ],
    ids=["file", "file-with-a-hook", "folder-with-a-choice"],
)
def test_a_checkpoint_holds_what_the_table_lists(
    line: tuple[str, ...], more: set[str], is_folder: bool, rank: RankPool, tmp_path: Path
) -> None:
    rank.run(fitted, words(tmp_path, "name=run", "trainer.max_steps=2", "eval.every_n_steps=2", *line))
    path = checkpoint_path(tmp_path / "runs" / "run" / "checkpoints", 2)
    assert path.is_dir() == is_folder
    assert set(read_checkpoint(path)) == (ROWS.keys() - SOMETIMES) | more
    assert {"choices", "residuals"} == SOMETIMES
