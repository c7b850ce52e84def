"""A file is whole or absent, whatever kills the writer."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightsparse.utils import atomic_files
from lightsparse.utils.atomic_files import atomic_write, remove_partial_files, sync_folder, writable, write_text
from lightsparse.utils.refusal import Refusal


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new, but not all of")
        raise RuntimeError("disk on fire")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_nothing_is_visible_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_sigkill_in_the_middle_leaves_only_a_partial_file_that_cleaning_removes(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from lightsparse.utils.atomic_files import atomic_write
        with atomic_write(Path({str(tmp_path / "step-5.ckpt")!r})) as file:
            file.write(b"x" * 100)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".") and not left.endswith(".ckpt")
    write_text(tmp_path / "keep.txt", "")
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == ["keep.txt"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders_is_named_once_and_other_errors_are_raised(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(atomic_files, "_unsynced", set())
    if not passes:
        with pytest.raises(OSError, match=os.strerror(number)):
            sync_folder(tmp_path)
        return
    for _ in range(2):
        sync_folder(tmp_path)
    assert caplog.text.count("does not sync folders: a power cut may undo its last files") == 1


def test_a_place_where_nothing_can_be_written_is_refused_and_none_is_made(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(Refusal, match=rf"^{folder} cannot be written to \(.+\); use to=<another folder>$"):
            writable(folder, "to")


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(tmp_path: Path, monkeypatch) -> None:
    done = []
    sync, rename = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        state = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(state.st_mode) else f"{state.st_size} bytes")
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_text(tmp_path / "a.txt", "seven b")
    assert done == ["7 bytes", "rename", "folder"]  # not flushed they would be none
