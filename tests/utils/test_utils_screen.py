"""What a program prints never ends it, wherever its output leads: the words are lost, and nothing else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, warnings
from lightsparse.utils.screen import survive_the_screen
survive_the_screen()
survive_the_screen()
for line in range(8000):
    print("step", line, "·", flush=line == 7)
    print("warning", line, "×", file=sys.stderr)
with open(sys.argv[1], "w") as file:  # not under the number of a closed output
    print("more")
    file.write("done")
"""


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_terminal() -> int:
    theirs, ours = pty.openpty()
    os.close(theirs)
    return ours


@pytest.mark.multiprocess
@pytest.mark.parametrize("screen", [closed_pipe, full_disk, gone_terminal])
def test_a_screen_that_is_gone_ends_nothing(screen, tmp_path: Path) -> None:
    if screen is full_disk and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    output = screen()
    try:
        words = [sys.executable, "-c", PROGRAM, str(tmp_path / "end")]
        code = subprocess.run(words, stdout=output, stderr=output, timeout=60, check=False).returncode
    finally:
        os.close(output)
    assert code == 0 and (tmp_path / "end").read_text() == "done"


@pytest.mark.multiprocess
def test_closed_outputs_are_nobody_else_s(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    line = f"exec {sys.executable} {script} {tmp_path}/end >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], timeout=60, check=False).returncode == 0
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.multiprocess
def test_a_character_that_the_screen_lacks_is_replaced(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "end")]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, env=ascii_only, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith(b"step 0 ?\n") and done.stderr.startswith(b"warning 0 \\xd7")


@pytest.mark.multiprocess
def test_a_slow_reader_of_a_pipe_that_does_not_block_misses_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "end")], stdout=writing) as program:
        os.close(writing)
        time.sleep(0.5)  # until the pipe is full
        with os.fdopen(reading) as file:
            lines = list(file)
            assert [line.split()[1] for line in lines[:-1]] == [str(number) for number in range(8000)]
    assert program.returncode == 0
