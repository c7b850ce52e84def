"""What doctor=true says of a run, and that it leaves no trace."""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from lightsparse.config.schema import Config
from lightsparse.training import run
from lightsparse.training.preflight import doctor
from lightsparse.training.preflight.doctor import checks, examine
from lightsparse.training.run import fit
from lightsparse.utils.text import size

Tiny = Callable[..., Config]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what measures the machine for longer than the tiny model trains."""
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    for module in (run, doctor):
        monkeypatch.setattr(module, "matmul_peak", lambda *given: 1e11)


def said(config: Config) -> dict[str, tuple[str, str]]:
    """Level and text by subject; the last of several."""
    return {line.subject: (line.level, line.text) for line in checks(config)}


def test_a_sound_run_gets_a_line_per_check_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isnan(examine(tiny("doctor=true")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", subject] for subject in ("config", "run", "disk", "ranks", "machine", "data", "time", "memory")
    ]
    assert lines[-1].startswith("0 problems, 0 warnings")
    text = "\n".join(lines)
    for part in ("fingerprint", "samples per epoch", "measured at the run's own shape", "GFLOP/s", "activations"):
        assert part in text
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_there_is_found_and_left_as_it_is(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=6")
    fit(config)
    path = Path(config.runs_dir) / config.name
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    assert said(tiny("trainer.max_steps=6"))["run"] == ("ok", f"{path} is finished at step 6; nothing would be done")
    level, text = said(tiny("trainer.max_steps=9"))["run"]
    assert level == "ok" and "would continue from step 6 (step-6.ckpt)" in text
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()} == before
    level, text = said(tiny("seed=3"))["run"]
    assert level == "problem" and "seed: 0 there, 3 here" in text
    with (path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        level, text = said(tiny("trainer.max_steps=9"))["run"]
        assert level == "problem" and f"is being written by process {os.getpid()}" in text


def test_changed_text_and_missing_text_are_problems(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"caf\xe9")
    level, text = said(tiny(f"data.path={tmp_path}/one.txt"))["data"]
    assert level == "problem" and "is not UTF-8 text" in text
    assert "time" not in said(tiny(f"data.path={tmp_path}/one.txt"))


@pytest.mark.parametrize(
    ("word", "subject", "sentence"),
    [
        ("attention.density=0.5", "config", "attention.density is 0.5"),
        ("eval.tokens=10", "config", "it must hold one sample"),
        ("model.activation_checkpointing=offload model.depth=2", "config", "use model.activation_checkpointing=true"),
        ("kernels.backend=flex", "machine", "has no backward on CPU"),
        ("runs_dir=pyproject.toml", "disk", "is no folder; set runs_dir="),
        ("trainer.max_time=1e-9", "time", "ends it before the first step"),
    ],
)
def test_what_would_be_refused_is_a_problem_with_the_same_words_and_code_2(
    word: str, subject: str, sentence: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        config = tiny(*word.split())
    except ValueError as error:  # what the schema refuses never comes here
        assert sentence in str(error)
        return
    with pytest.raises(SystemExit) as stopped:
        examine(config)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert line.split()[1] == subject and sentence in line


def test_too_little_memory_is_a_problem_with_settings_that_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("data.context=256", "data.batch_size=8", "eval.tokens=256")
    config = tiny(*words)
    needed = doctor.estimate(config)
    free = int(needed.process + 0.7 * (needed.total - needed.process))
    monkeypatch.setattr(doctor, "memory_per_rank", lambda config: (2**34, free))
    level, text = said(config)["memory"]
    assert level == "problem" and "set data.batch_size=" in text
    assert "extrapolated by FLOPs" in said(config)["time"][1]  # it is not tried where it may not fit


def test_main_memory_for_the_layers_inputs_is_named_and_too_little_of_it_is_a_problem(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("model.activation_checkpointing=offload", "model.depth=3")
    needed = doctor.estimate(config)
    assert needed.main_memory > 0
    monkeypatch.setattr(doctor, "memory_per_rank", lambda config: (2**34, 2**34))
    monkeypatch.setattr(doctor, "room_for_layers", lambda config: needed.main_memory)
    (line,) = doctor._memory(config, [])
    assert line.level == "ok" and f" and {size(needed.main_memory)} of main memory per rank" in line.text
    monkeypatch.setattr(doctor, "room_for_layers", lambda config: needed.main_memory - 1)
    (line,) = doctor._memory(config, [])
    assert line.level == "problem" and f"and of main memory {size(needed.main_memory - 1)} may be taken" in line.text


def test_a_disk_that_is_nearly_full_is_a_warning(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    config = tiny("optimizer=adamw", "checkpoint.keep_best=false")
    one = 3 * 4 * sum(p.numel() for p in doctor.meta_model(config).parameters())
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, int(3.1 * one)))
    assert said(config)["disk"][0] == "warning"
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 2 * one))
    assert said(config)["disk"][0] == "problem"


def test_a_disk_that_gives_no_locks_is_a_problem(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    level, text = said(tiny())["disk"]
    assert level == "problem" and "cannot be locked (No locks available)" in text


def test_ranks_are_shown_with_who_shares_a_sequence(tiny: Tiny) -> None:
    config = tiny("attention=block_sparse", "attention.block=16", "attention.segment_lengths=[32]",
                     "attention.dilation_rates=[2]", "attention.pattern.local.window=16",
                     "strategy=context", "strategy.context_parallel_size=2", "trainer.devices=4")  # fmt: skip
    (line,) = doctor._ranks(config)
    assert "4 = 2 data × 2 context, context; 4 samples" in line.text
    assert "ranks 0–1, 2–3 share a sequence" in line.text or line.level == "warning"
