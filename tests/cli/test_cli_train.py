"""The command line: four steps, one sentence and exit code 2 for what is wrong, a number for sweepers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightsparse.cli import train as cli
from lightsparse.cli.work import train as work
from lightsparse.config.compose import compose_raw, conf_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command in this process on a stand-in for training; returns the configs that reached it."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def fit(config):
        assert config.composed["name"] in (None, config.name)
        seen.append(config)
        return {"val_bits_per_byte": 0.25 * config.seed}

    monkeypatch.setattr(work, "fit", fit)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        cli.main()
        return seen

    return call


def test_a_good_command_line_reaches_training_once_and_hydra_writes_nothing(run, tmp_path):
    assert [config.seed for config in run("experiment=smoke", "seed=3")] == [3]
    assert list(tmp_path.iterdir()) == []


def test_hydras_own_launcher_runs_every_value_in_this_process(run, tmp_path):
    assert [config.seed for config in run("-m", "hydra/launcher=basic", "experiment=smoke", "seed=1,2,3")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["multirun.yaml"]


def test_training_returns_validation_bits_per_byte_for_sweepers(run):
    assert cli.train(OmegaConf.create(compose_raw(["seed=2"]))) == 0.5


WRONG = {
    "atention=dense": "atention is not a key; did you mean attention?",
    "attention=nope": "attention is nope; conf/attention has ",
    "attention=3": "Hydra: Config group override must be a string or a list. Got int; "
    "write group=<name of a file in conf/group> or key=value",
    "+seeed=1": "seeed is not a key; did you mean seed?",
    "trainer.max_steps=0": "trainer.max_steps is 0; it must be at least 1",
    "data=files data.path=nowhere/": "data.path is 'nowhere/' and no file is there",
    "-m seed=1,2 trainer.max_stps=1": "trainer.max_stps is not a key; did you mean trainer.max_steps?",
    "-m seed=1,x": "seed is 'x'; it must be an integer",
    "-m hydra/launcher=basic seed=1,2 strategy=ddp trainer.devices=2": "the trial has 2 ranks (trainer.devices × "
    "trainer.num_nodes) and runs inside the sweep's process; use hydra/launcher=trials",
    "-m attention=dense,nope": "attention is nope; conf/attention has ",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_prints_one_sentence_alone_and_ends_with_code_2(run, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run(*words.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(WRONG[words]) and printed.err.count("\n") == 1 and printed.out == ""


def test_an_error_of_ours_inside_training_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(work, "fit", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("experiment=smoke")


def test_the_command_says_how_threads_wait_before_torch_loads():
    asks = "import os, sys, lightsparse.cli.train; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "10000"]


@pytest.mark.multiprocess
def test_a_run_whose_reader_is_gone_is_finished_as_any_other(command, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    words = command("trainer.max_steps=2", "trainer.progress=true", "eval.sample_tokens=0")
    code = subprocess.run(words, stdout=writing, stderr=writing, timeout=120, check=False).returncode
    os.close(writing)
    assert code == 0 and json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 2


def test_conf_is_found_without_the_clone_around_it():
    assert (conf_dir() / "config.yaml").is_file()
    assert conf_dir().parent in (ROOT, ROOT / "lightsparse")


@pytest.mark.slow
def test_the_smoke_recipe_trains_from_text_to_summary(tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), "experiment=smoke", f"runs_dir={tmp_path}", "name=smoke"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text(encoding="utf-8"))
    assert summary["finished"] and summary["steps"] == 20
    assert 0 < summary["val_bits_per_byte"] < 8
