"""The runs of a sweep side by side: the same numbers as of each run alone, as a table, CSV and Markdown."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightsparse.cli import evaluate
from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import parse
from lightsparse.data.tasks.task import VAL, TaskSamples
from lightsparse.evaluation.distance import by_distance
from lightsparse.evaluation.subject import OwnModel
from lightsparse.sweep.record import SweepRecord, TrialRecord
from lightsparse.training import run as training_run
from lightsparse.training.checkpoints.load_run import load_run
from lightsparse.training.run import fit

TINY = (
    "precision=32",
    *("data=recall_stream", "data.context=64", "data.vocabulary=16", "data.pairs=8", "data.nearest=12"),
    *("data.examples=32", "model=nano", "model.depth=2", "model.embed_dim=32", "model.heads=1", "model.mlp=none"),
    *("model.layer_pattern=LS", "model.local_window=4", "trainer.max_steps=1", "trainer.progress=false", "threads=1"),
    *("eval.tokens=64", "eval.sample_tokens=0"),
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """A sweep of two finished runs and one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    record = SweepRecord(folder / "sweep", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "draw_plots", lambda *given: None)
        patch.setattr(training_run, "matmul_peak", lambda *given: 1e11)
        for name, words in (
            ("dense", ["attention=dense"]),
            ("narrow", ["attention=sliding_window", "attention.window=8", "attention.sinks=0", "attention.block=8"]),
        ):
            fit(parse(compose_raw([*TINY, *words, f"name={name}", f"runs_dir={folder}"])))
            record.trials.append(
                TrialRecord(words, [f"attention={name}", "seed=1"], f"elsewhere/{name}", 1, "finished")
            )
    record.trials.append(TrialRecord(["x"], ["x=1"], "elsewhere/x", 1, "failed", error="no"))
    record.directory.mkdir()
    record.save()
    return record


def test_a_row_holds_what_the_run_alone_would_give(sweep: SweepRecord, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"sweep={sweep.directory}", "lengths=[32,128]", "examples=3", "seed=5", "reach=20"]
    assert evaluate.main(words) == 0
    with open(sweep.directory / "answers.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["dense 1", "narrow 1"]
    assert float(rows[0]["density"]) == 1 and 0 < float(rows[1]["density"]) < 0.5
    run = load_run(sweep.directory.parent / "narrow")
    alone = by_distance(OwnModel(run.model), TaskSamples(run.config.data, 5, VAL, 3), 20)  # type: ignore[arg-type]
    names = {f"accuracy_{part['start']}_to_{part['end'] - 1}": part["accuracy"] for part in alone}
    assert "accuracy_16_to_20" in names and {name: float(rows[1][name]) for name in names} == names
    assert {"accuracy_32", "accuracy_128"} < rows[0].keys() and "accuracy_64" not in rows[0]
    table = (sweep.directory / "answers.md").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("| run | density | steps | tokens per s | 32 | 128 | 0–15 |") and len(table) == 4
    assert "narrow 1" in capsys.readouterr().out


def test_without_lengths_it_is_that_of_the_training(sweep: SweepRecord, tmp_path: Path) -> None:
    assert evaluate.main([f"sweep={sweep.directory}", "examples=1", f"out={tmp_path / 'there'}"]) == 0
    header = (tmp_path / "there" / "answers.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:5] == ["run", "density", "steps", "tokens_per_s", "accuracy_64"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sweep=nowhere", "sweep is nowhere, where there is no sweep.json"),
        ("sweep=SWEEP run=runs/x", "name one model"),
        ("sweep=SWEEP distances=true", "belong to run="),
        ("sweep=SWEEP lengths=[16]", "data.context is 16"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    words: str, sentence: str, sweep: SweepRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(words.replace("SWEEP", str(sweep.directory)).split()) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SweepRecord(tmp_path, [], [TrialRecord(["x=1"], ["x=1"], "elsewhere/gone", 1, "finished")]).save()
    assert evaluate.main([f"sweep={tmp_path}"]) == 2
    assert "elsewhere/gone, which is not there any more" in capsys.readouterr().err


def test_a_sweep_without_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SweepRecord(tmp_path, []).save()
    assert evaluate.main([f"sweep={tmp_path}"]) == 2
    assert "no trial has finished" in capsys.readouterr().err
