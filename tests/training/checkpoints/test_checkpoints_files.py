"""A checkpoint that cannot be opened now is neither called damaged nor passed over."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lightsparse.config.targets import ConfigError
from lightsparse.training.checkpoints.files import checkpoint_path, checkpoint_steps, damage_of, newest_checkpoint


def saved(folder: Path, *steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        torch.save({"state_dict": {"w": torch.ones(3)}}, checkpoint_path(folder, step))


def test_one_that_may_not_be_read_ends_the_search_for_the_newest(tmp_path: Path, monkeypatch) -> None:
    saved(tmp_path, 1, 2)
    opened = zipfile.ZipFile

    def refuse(path: Path) -> zipfile.ZipFile:
        if path == checkpoint_path(tmp_path, 2):
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(ConfigError, match=r"step-2\.ckpt cannot be opened \(Permission denied\) and may be whole"):
        newest_checkpoint(tmp_path)
    assert damage_of(checkpoint_path(tmp_path, 1)) is None


def test_a_folder_that_may_not_be_read_is_not_taken_for_empty(tmp_path: Path, monkeypatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    assert checkpoint_steps(tmp_path / "none") == {}
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be opened \(Permission denied\)"):
        checkpoint_steps(tmp_path)


def test_a_part_of_a_folder_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    folder = checkpoint_path(tmp_path, 1)
    folder.mkdir()
    (folder / "checksums-0.json").write_text("{}")

    def refuse(path: Path, **given: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"step-1\.ckpt cannot be opened \(Permission denied\)"):
        newest_checkpoint(tmp_path)


@pytest.mark.multiprocess
def test_one_below_a_name_that_the_locale_cannot_write_is_whole(tmp_path: Path) -> None:
    saved(tmp_path / "läufe", 5)
    script = (
        "import sys; from pathlib import Path\n"
        "from lightsparse.training.checkpoints.files import newest_checkpoint, read_checkpoint\n"
        "assert sys.getfilesystemencoding() != 'utf-8'\n"
        "(folder,) = Path(sys.argv[1]).iterdir()\n"
        "step, path = newest_checkpoint(folder)\n"
        "assert step == 5 and bool((read_checkpoint(path)['state_dict']['w'] == 1).all())\n"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ | ascii_only, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
