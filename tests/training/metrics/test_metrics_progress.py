"""What a user reads while it trains and when it ends, on a terminal and in a log file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lightsparse.config.schema import Config
from lightsparse.training import run
from lightsparse.training.metrics import progress
from lightsparse.training.metrics.summary import show
from lightsparse.training.run import fit
from lightsparse.utils.text import duration

Tiny = Callable[..., Config]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


@pytest.mark.usefixtures("quick")
def test_a_log_file_gets_a_line_per_step_and_validation_and_none_twice(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", -1.0)
    fit(tiny("trainer.progress=true", "trainer.accumulate_grad_batches=2"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [words[1] for words in lines if "validation" in words] == ["0", "4", "8", "12"]
    steps = [line for line in lines if "validation" not in line]
    assert [words[1] for words in steps] == [f"{step}/12" for step in range(1, 13)]
    for words in steps:
        assert {"loss", "bits/byte", "tokens/s", "left"} <= set(words)


@pytest.mark.usefixtures("quick")
def test_a_terminal_gets_a_bar_with_loss_bits_tokens_and_time_left(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(run, "build_trainer", lambda *given, build=run.build_trainer: build(*given[:-1], terminal))
    fit(tiny("trainer.progress=true"))
    bar = next(line for line in reversed(screen.getvalue().replace("\r", "\n").split("\n")) if "12/12" in line)
    for word in ("train", "loss", "bits/byte", "tokens/s", "left"):
        assert word in bar, word


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_read_as_one_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_summary_is_never_cut_off_however_narrow_the_screen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    summary = {
        "val_bits_per_byte": 2.5, "val_loss": 1.7, "val_perplexity": 5.5, "steps": 600, "tokens": 2e6, "wall_s": 240.0,
        "tokens_per_s": None, "mfu": None, "attention_density": 0.3, "attention": "block_sparse",
    }  # fmt: skip
    path = Path("/a/rather/long/path", *["and/further"] * 10, "[run]")
    show(Console(file=screen, width=40, highlight=False, markup=False, soft_wrap=True), summary, path)
    assert screen.getvalue().splitlines()[-1] == f"run directory  {path}"
    assert "2.5000 bits per byte" in screen.getvalue().splitlines()[0]
