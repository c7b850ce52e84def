"""Every ending has its code and its sentence; what says that the run may be resumed says from which step."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lightsparse.config.schema import Config
from lightsparse.training import endings
from lightsparse.training.checkpoints import background_writer
from lightsparse.training.endings import CODES, in_one_sentence, resumable
from lightsparse.utils.atomic_files import DiskFullError
from lightsparse.utils.rank_errors import LostRankError, RankError, RankTimeoutError

Tiny = Callable[..., Config]


class Left(BaseException):
    """Stands for the end of this process, at once."""


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Code and sentence with which the process was left at once."""
    endings_seen: list[tuple[int, str]] = []

    def leave(code: int, sentence: str = "") -> None:
        endings_seen.append((code, sentence))
        raise Left

    monkeypatch.setattr(endings, "leave", leave)
    return endings_seen


@pytest.mark.parametrize("kind", [kind for kind in CODES if kind is not RankError])
def test_an_error_of_the_table_is_its_code_and_its_message_alone(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending, in_one_sentence():
        raise kind("lr is 0; it must be above 0")
    assert ending.value.code == CODES[kind] and CODES[kind] in (2, 75)
    assert capsys.readouterr().err == "lr is 0; it must be above 0\n"


@pytest.mark.parametrize("kind", [LostRankError, RankTimeoutError])
def test_ranks_that_lost_each_other_do_not_wait_once_more(kind: type[Exception], left: list[tuple[int, str]]) -> None:
    with pytest.raises(Left), in_one_sentence():
        raise kind("rank 0 of 2 has lost another rank")
    assert left == [(75, "rank 0 of 2 has lost another rank")]


def test_an_error_of_the_program_keeps_its_traceback_and_a_good_end_is_none() -> None:
    with pytest.raises(ZeroDivisionError), in_one_sentence():
        _ = 1 / 0
    with in_one_sentence():
        pass


@pytest.mark.parametrize("code", [75, 1])
def test_a_process_that_is_writing_a_checkpoint_is_left_at_once(code: int, left: list[tuple[int, str]]) -> None:
    written = threading.Event()
    thread = threading.Thread(target=written.wait, name=background_writer._THREAD)
    thread.start()
    try:
        with pytest.raises(Left), in_one_sentence():
            raise SystemExit(code)
    finally:
        written.set()
        thread.join()
    assert left == [(code, "")]
    with pytest.raises(SystemExit), in_one_sentence():
        raise SystemExit(code)


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [
        (
            RuntimeError("[gloo/pair.cc:5] Connection closed by peer"),
            LostRankError,
            "this rank has lost another rank, which ended or cannot be reached; the same command",
        ),
        (
            RankTimeoutError("rank 1 of 2 has waited for another rank"),
            RankTimeoutError,
            "rank 1 of 2 has waited for another rank within 7 s (strategy.timeout); the same command",
        ),
        (
            RankTimeoutError("rank 1 came late within 7 s (strategy.timeout)"),
            RankTimeoutError,
            "rank 1 came late within 7 s (strategy.timeout); the same command",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            DiskFullError,
            "MiB free; free some or lower checkpoint.keep; the same command",
        ),
    ],
    ids=["lost", "late", "late-named", "disk"],
)
def test_what_may_be_resumed_says_from_which_step(
    raised: Exception, kind: type[Exception], sentence: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny("strategy=ddp", "strategy.timeout=7")
    with pytest.raises(kind) as ending, resumable(config):
        raise raised
    assert f"{sentence} continues from step 0" in str(ending.value)
    for step in (4, 12):
        path = tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{step}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(kind) as ending, resumable(config):
        raise raised
    assert str(ending.value).endswith("the same command continues from step 12")


def test_another_error_passes_unchanged(tiny: Tiny) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as ending, resumable(tiny()):
        raise error
    assert ending.value is error
