"""`lightsparse evaluate`: results of a run in files, refusals as one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightsparse.cli import evaluate
from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import parse
from lightsparse.training import run as training_run
from lightsparse.training.run import fit

TINY = (
    "precision=32",
    *("attention=dense", "model=nano", "model.depth=1", "model.embed_dim=32", "model.heads=2", "model.head_dim=16"),
    *("trainer.max_steps=2", "trainer.progress=false", "threads=1", "eval.sample_tokens=0", "eval.every_n_steps=2"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `text` on a small corpus, `task` on MQAR with learned positions."""
    folder = tmp_path_factory.mktemp("runs")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"Document {i}. " * 60)
    text = ("data=files", f"data.path={folder}/*.txt", "data.context=256", "data.val_fraction=0.3", "eval.tokens=1024")
    task = ("data=mqar", "data.vocabulary=64", "data.examples=64", "data.batch_size=8", "eval.tokens=1280")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "draw_plots", lambda *given: None)
        patch.setattr(training_run, "matmul_peak", lambda *given: 1e11)
        for name, words in (("text", text), ("task", (*task, "model.positions=learned"))):
            fit(parse(compose_raw([*TINY, *words, f"name={name}", f"runs_dir={folder}"])))
    return folder


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_tasks_and_positions_of_a_text_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={runs / 'text'}", "tasks=[passkey,niah_single_2]", "lengths=[512,700]", "depths=[0,1]", "examples=1"]
    assert evaluate.main([*words, "positions=true"]) == 0
    out = runs / "text" / "evaluation"
    grid = [(row["length"], row["depth"]) for row in rows(out / "passkey.json")]
    assert grid == [(512, 0.0), (512, 1.0), (700, 0.0), (700, 1.0)]
    assert all(row["score"] is not None for row in rows(out / "niah_single_2.json"))
    assert [row["start"] for row in rows(out / "positions.json")] == [0, 16, 32, 64, 128]
    for name in ("passkey.png", "passkey.csv", "positions.png", "positions.csv"):
        assert (out / name).stat().st_size > 0
    printed = capsys.readouterr().out
    assert "passkey: score" in printed and "loss by position" in printed and str(out) in printed


def test_positions_beyond_those_of_the_training_are_asked_for_by_a_context(runs: Path) -> None:
    words = [f"run={runs / 'text'}", "positions=true", f"out={runs / 'long'}"]
    assert evaluate.main([*words, "context=512"]) == evaluate.main(words) == 0
    longer, own = (rows(runs / "long" / f"positions{name}.json") for name in ("-512", ""))
    assert [row["start"] for row in longer] == [0, 16, 32, 64, 128, 256]
    assert sum(row["targets"] for row in longer) == sum(row["targets"] for row in own) == 1024
    assert (runs / "long" / "positions-512.png").stat().st_size > 0


def test_the_own_task_of_a_run_by_length_and_by_distance(runs: Path) -> None:
    words = [f"run={runs / 'task'}", "tasks=[own]", "lengths=[32,64]", "examples=3"]
    assert evaluate.main([*words, "distances=true", "reach=20", f"out={runs / 'there'}"]) == 0
    assert [row["length"] for row in rows(runs / "there" / "own.json")] == [32, 64]
    found = rows(runs / "there" / "distances.json")
    assert 21 in {row["end"] for row in found} and sum(row["answers"] for row in found) == 20 * 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("run=nowhere tasks=[passkey]", "run is nowhere, where there is no config.yaml"),
        ("run=RUNS/text", "nothing is asked for; add tasks=[…]"),
        ("run=RUNS/text tasks=[passkeys]", "tasks names passkeys, which is none; there are own, common_words"),
        ("run=RUNS/text tasks=[own]", "was not trained on a task"),
        ("run=RUNS/text tasks=[mqar] lengths=[64]", "whose 8192 ids the model does not have (256)"),
        ("run=RUNS/text tasks=[passkey] lengths=[100]", "data.context is 100, too short for a problem of Passkey"),
        ("run=RUNS/text tasks=[passkey] depth=[1]", "depth is not a key; did you mean depths?"),
        ("run=RUNS/text tasks=[passkey] depths=[2]", "depths is [2"),
        ("run=RUNS/text distances=true", "was not trained on a task"),
        ("run=RUNS/text positions=true context=2048", "context is 2048, more than the run's validation text (eval."),
        ("run=RUNS/task positions=true context=128", "the text has 128 tokens, and this model has learned 64"),
        ("run=RUNS/text tasks=[passkey] context=64", "context is 64, which only positions=true reads"),
        ("run=RUNS/task tasks=[own] lengths=[128]", "lengths has 128, but the model has learned 64 positions"),
        ("tasks=[passkey]", "name one model"),
        ("model=x tasks=[passkey]", "model=… needs out=<folder>"),
        ("words", "words is not key=value; write lightsparse evaluate run="),
    ],
)
def test_a_wrong_word_is_one_sentence(
    words: str, sentence: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(words.replace("RUNS", str(runs)).split()) == 2
    assert sentence in capsys.readouterr().err


def test_help_is_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    assert "tasks=[…]" in capsys.readouterr().out
