"""Whole runs: what they leave, and that being interrupted changes nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training import run
from lightsparse.training.checkpoints import callback
from lightsparse.training.checkpoints.files import checkpoint_steps, read_checkpoint
from lightsparse.training.health import NonFiniteError
from lightsparse.training.measures.loss_sums import Totals
from lightsparse.training.metrics.metrics_file import COLUMNS, read_metrics
from lightsparse.training.module import LanguageModel
from lightsparse.training.run import fit

Tiny = Callable[..., Config]
TIMINGS = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}


class Killed(Exception):
    """Stands for SIGKILL where the test must live on."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than twelve steps of the tiny model: plots, and measuring the machine."""
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def rows(config: Config) -> list[dict[str, float]]:
    """metrics.csv without what the clock decides."""
    table = read_metrics(folder(config) / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in table]


def final_state(config: Config) -> dict[str, Any]:
    path = folder(config) / "checkpoints" / f"step-{config.trainer.max_steps}.ckpt"
    return torch.load(path, weights_only=True)


def killed(hook: str, step: int, config: Config) -> None:
    """A run that dies as it enters `hook` of the module after `step` optimizer steps."""
    whole = getattr(LanguageModel, hook)

    def dying(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Killed
        return whole(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModel, hook, dying)
        fit(config)


def test_a_run_leaves_what_it_promises(tiny: Tiny) -> None:
    config = tiny()
    summary = fit(config)
    left = folder(config)
    assert json.loads((left / "summary.json").read_text()) == summary
    assert summary["finished"] is True and summary["steps"] == 12 and summary["tokens"] == 12 * 2 * 64
    assert summary["parameters"] > 0 and summary["tokens_per_s"] > 0 and summary["mfu"] > 0 and summary["wall_s"] > 0
    assert summary["val_bits_per_byte"] < 8 and summary["attention_density"] == 1.0
    for name in ("config.yaml", "metrics.csv", "plots/loss.png", "plots/loss_by_position.png", "plots/attention.png"):
        assert (left / name).stat().st_size > 0, name
    text = (left / "sample.txt").read_text()
    assert text.startswith("════ prompt") and "\n════ continuation" in text
    assert list(checkpoint_steps(left / "checkpoints")) == [10, 12]
    assert [path.name for path in left.rglob(".*")] == [".lock"]


@pytest.mark.usefixtures("quick")
def test_rows_start_at_step_0_rise_and_hold_one_validation_where_due(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=10", "trainer.log_every_n_steps=3")
    summary = fit(config)
    table = rows(config)
    assert [row["step"] for row in table] == [0, 3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in table if "val_loss" in row] == [0, 4, 8, 10]
    assert all("train_loss" in row for row in table[1:])
    assert table[-1]["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert table[0]["val_bits_per_byte"] == pytest.approx(8.0, abs=0.3)
    assert set(read_metrics(folder(config) / "metrics.csv")[-1]) == set(COLUMNS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "words",
    [
        ("optimizer=adamw", "attention.dropout=0.2", "trainer.accumulate_grad_batches=2"),
        ("optimizer=muon", "schedule=cosine", "data.pack=concat", "checkpoint.every_n_steps=4"),
        ("optimizer=muon", "objective=mlm", "checkpoint.every_n_steps=1", "eval.every_n_steps=3"),
    ],
    ids=["adamw-dropout-accumulate", "muon-cosine-concat", "muon-mlm"],
)
def test_an_interrupted_run_ends_with_the_same_bits(words: tuple[str, ...], tiny: Tiny) -> None:
    whole = tiny("name=whole", *words)
    fit(whole)
    parts = tiny("name=parts", *words)
    for hook, step in [
        ("validation_step", 0),
        ("training_step", 2),
        ("training_step", 7),
        ("training_step", 8),
        ("training_step", 10),
        ("validation_step", 12),
    ]:
        killed(hook, step, parts)
    fit(parts)
    assert rows(parts) == rows(whole)
    one, two = final_state(whole), final_state(parts)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for key in ("DataModule", "lr_schedulers", "global_step", "validation"):
        assert one[key] == two[key], key


@pytest.mark.usefixtures("quick")
def test_a_run_continues_from_its_newest_checkpoint_and_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    killed("training_step", 7, config)
    capsys.readouterr()
    before = json.dumps(rows(config)[:6])
    fit(config)
    assert "tiny continues from step 5" in " ".join(capsys.readouterr().out.split())
    assert json.dumps(rows(config)[:6]) == before


@pytest.mark.usefixtures("quick")
def test_a_damaged_newest_checkpoint_is_passed_over(tiny: Tiny) -> None:
    config = tiny()
    killed("training_step", 11, config)
    damaged = folder(config) / "checkpoints" / "step-10.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    fit(config)
    assert [row["step"] for row in rows(config)] == list(range(13))
    assert torch.load(damaged, weights_only=True)["global_step"] == 10


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_shown_and_not_repeated(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    summary = fit(config)
    before = {path: path.stat().st_mtime_ns for path in folder(config).rglob("[!.]*")}
    capsys.readouterr()
    assert fit(config) == summary
    assert "is finished at step 12" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in folder(config).rglob("[!.]*")} == before


def test_a_run_killed_after_its_last_step_only_finishes_its_files(tiny: Tiny) -> None:
    config = tiny()
    summary = fit(config)
    before = rows(config)
    for name in ("summary.json", "sample.txt", "plots/loss.png"):
        (folder(config) / name).unlink()
    again = fit(config)
    assert rows(config) == before
    assert {key: again[key] for key in ("steps", "tokens", "val_loss", "attention_density")} == {
        key: summary[key] for key in ("steps", "tokens", "val_loss", "attention_density")
    }
    assert (folder(config) / "sample.txt").exists() and (folder(config) / "plots" / "loss.png").exists()


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_extended_by_more_steps(tiny: Tiny) -> None:
    short = tiny("trainer.max_steps=6", "schedule=constant")
    fit(short)
    long = tiny("trainer.max_steps=12", "schedule=constant")
    summary = fit(long)
    whole = tiny("trainer.max_steps=12", "schedule=constant", "name=whole")
    assert summary["val_loss"] == fit(whole)["val_loss"]
    assert summary["steps"] == 12
    assert [row["step"] for row in rows(long)] == list(range(13))


@pytest.mark.usefixtures("quick")
def test_wall_clock_and_speed_cover_all_restarts(tiny: Tiny) -> None:
    config = tiny()
    killed("training_step", 11, config)
    first = read_metrics(folder(config) / "metrics.csv")
    summary = fit(config)
    walls = [row["wall_s"] for row in read_metrics(folder(config) / "metrics.csv")]
    assert walls == sorted(walls)
    assert summary["wall_s"] > first[10]["wall_s"]
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["train_s"])


@pytest.mark.usefixtures("quick")
def test_only_the_newest_checkpoints_stay(tiny: Tiny) -> None:
    config = tiny("checkpoint.every_n_steps=2", "checkpoint.keep=3")
    fit(config)
    assert list(checkpoint_steps(folder(config) / "checkpoints")) == [8, 10, 12]


@pytest.mark.usefixtures("quick")
def test_callbacks_of_lightnings_own_have_a_folder_beside_ours_and_leave_one_row_a_step(tiny: Tiny) -> None:
    best = "+callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 4}"
    timer = "+callbacks.timer={_target_: lightning.pytorch.callbacks.Timer, duration: {microseconds: 1}}"
    config = tiny(timer, "trainer.log_every_n_steps=1")
    fit(config)
    assert [row["step"] for row in rows(config)] == [0, 1]
    assert "val_loss" in rows(config)[1]
    config = tiny(best, "name=longer")
    fit(config)
    assert [path.name for path in (folder(config) / "lightning/checkpoints").iterdir()] == ["epoch=0-step=12.ckpt"]
    assert list(checkpoint_steps(folder(config) / "checkpoints"))[-1] == 12


@pytest.mark.usefixtures("quick")
def test_checkpoints_have_lightnings_keys(tiny: Tiny) -> None:
    config = tiny()
    fit(config)
    checkpoint = final_state(config)
    assert {"state_dict", "global_step", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(checkpoint)
    assert checkpoint["DataModule"]["consumed"] == 12 * 2


@pytest.mark.usefixtures("quick")
def test_never_and_another_config_are_refused_before_anything_is_touched(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=4")
    fit(config)
    before = {path: path.stat().st_mtime_ns for path in folder(config).rglob("[!.]*")}
    with pytest.raises(ConfigError, match="already holds a run at step 4"):
        fit(tiny("resume=never"))
    with pytest.raises(ConfigError, match="seed: 0 there, 3 here"):
        fit(tiny("seed=3"))
    assert {path: path.stat().st_mtime_ns for path in folder(config).rglob("[!.]*")} == before


@pytest.mark.usefixtures("quick")
def test_a_run_that_diverges_stops_with_a_sentence_and_a_sound_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    training_step = LanguageModel.training_step

    def diverging(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        return training_step(self, batch, batch_idx) * (float("nan") if self.global_step >= 5 else 1.0)

    monkeypatch.setattr(LanguageModel, "training_step", diverging)
    with pytest.raises(NonFiniteError, match=r"at step 9, after health\.skip_steps=3 skipped steps in a row"):
        fit(config)
    *_, path = checkpoint_steps(folder(config) / "checkpoints").values()
    assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_trains_to_nearly_the_same_loss(precision: str, tiny: Tiny) -> None:
    full = fit(tiny("name=full"))
    low = fit(tiny(f"name={precision}", f"precision={precision}"))
    assert low["val_bits_per_byte"] == pytest.approx(full["val_bits_per_byte"], rel=0.03)
    assert low["precision"] == precision


@pytest.mark.usefixtures("quick")
def test_extra_loggers_get_the_same_rows_in_the_run_directory(tiny: Tiny) -> None:
    config = tiny("+logger.also._target_=lightning.pytorch.loggers.CSVLogger", "trainer.max_steps=4")
    fit(config)
    (extra,) = folder(config).rglob("lightning_logs/*/metrics.csv")
    assert extra.read_text().count("\n") == 1 + 5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", [5, 7])
def test_loggers_that_take_nothing_back_get_each_step_once_over_restarts(step: int, tiny: Tiny) -> None:
    """Killed after a checkpoint of step 5: before or after its rows were sent, and with rows of later steps."""
    config = tiny("+logger.also._target_=lightning.pytorch.loggers.CSVLogger")
    killed("training_step", step, config)
    fit(config)
    tables = [read_metrics(path) for path in sorted(folder(config).rglob("lightning_logs/*/metrics.csv"))]
    assert [int(row["step"]) for table in tables for row in table] == list(range(13))
    assert [row["train_loss"] for table in tables for row in table if row["step"] > 0] == pytest.approx(
        [row["train_loss"] for row in rows(config)[1:]]
    )


@pytest.mark.usefixtures("quick")
def test_a_run_killed_as_its_last_checkpoint_got_its_name_is_tidied_by_the_next_start(tiny: Tiny) -> None:
    """Loggers get their last rows, best.json and the checkpoints are those of an untouched run."""
    words = ("+logger.also._target_=lightning.pytorch.loggers.CSVLogger", "checkpoint.background=false")
    whole = tiny("name=whole", *words)
    fit(whole)
    config = tiny("name=parts", *words)
    tidy = callback.StepCheckpoint._tidy

    def dying(self: callback.StepCheckpoint, step: int, *best: Any) -> None:
        if step == 12:
            raise Killed
        tidy(self, step, *best)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callback.StepCheckpoint, "_tidy", dying)
        fit(config)
    fit(config)
    tables = [read_metrics(path) for path in sorted(folder(config).rglob("lightning_logs/*/metrics.csv"))]
    assert [int(row["step"]) for table in tables for row in table] == list(range(13))
    left = [folder(each) / "checkpoints" for each in (config, whole)]
    assert (left[0] / "best.json").read_text() == (left[1] / "best.json").read_text()
    assert list(checkpoint_steps(left[0])) == list(checkpoint_steps(left[1]))


@pytest.mark.usefixtures("quick")
def test_the_best_checkpoint_stays_beside_the_newest(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations after steps 2, 4, … give 5, 3, 4, 6, 7, 8: that of step 4 is the best."""
    config = tiny("eval.every_n_steps=2", "checkpoint.every_n_steps=5")
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    whole = LanguageModel.on_validation_epoch_end

    def told(self: LanguageModel) -> None:
        whole(self)
        self.validation = Totals(next(losses), 1.0, 1.0)

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_end", told)
    fit(config)
    checkpoints = folder(config) / "checkpoints"
    assert list(checkpoint_steps(checkpoints)) == [4, 10, 12]
    assert json.loads((checkpoints / "best.json").read_text()) == {"step": 4, "val_loss": 3.0}


@pytest.mark.usefixtures("quick")
def test_generators_that_a_callback_draws_from_go_on_where_they_were(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, float, float, float]] = []
    begun = LanguageModel.training_step

    def drawing(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        drawn.append((self.global_step, random.random(), float(np.random.rand()), float(torch.rand(()))))
        return begun(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", drawing)
    fit(tiny("name=whole"))
    whole, parts = list(drawn), tiny("name=parts")
    drawn.clear()
    killed("training_step", 7, parts)
    before = [numbers for numbers in drawn if numbers[0] < 5]
    drawn.clear()
    fit(parts)
    assert before + drawn == whole


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_tells_config_and_code(tiny: Tiny, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny("trainer.max_steps=5", "schedule=constant")
    fit(config)
    stored = read_checkpoint(folder(config) / "checkpoints" / "step-5.ckpt")
    assert stored["config"] == config.composed and stored["code"]["torch"] == torch.__version__
    monkeypatch.setattr(callback, "code_version", lambda: {**stored["code"], "torch": "9.9"})
    with caplog.at_level("WARNING"):
        fit(tiny("trainer.max_steps=6", "schedule=constant"))
    assert f"started with other code: torch {torch.__version__} → 9.9" in caplog.text


@pytest.mark.multiprocess
@pytest.mark.usefixtures("quick")
def test_wandb_knows_a_run_by_one_id_over_restarts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(tiny("logger=wandb", "trainer.max_steps=2", "schedule=constant"))
    wandb.finish()
    config = tiny("logger=wandb", "trainer.max_steps=4", "schedule=constant")
    fit(config)
    wandb.finish()
    identity = (folder(config) / "run_id").read_text().strip()
    starts = list(folder(config).glob("wandb/offline-run-*"))
    assert starts and {path.name.rpartition("-")[2] for path in starts} == {identity}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("number", "batch"),
    [(signal.SIGTERM, 2), (signal.SIGTERM, 6), (signal.SIGUSR1, 7), (signal.SIGINT, 13)],
    ids=["SIGTERM-2", "SIGTERM-6", "SIGUSR1-7", "SIGINT-13"],
)
def test_a_signal_saves_the_step_under_way_ends_with_75_and_changes_no_bit(
    number: signal.Signals, batch: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("trainer.accumulate_grad_batches=2", "attention.dropout=0.2")
    whole = tiny("name=whole", *words)
    fit(whole)
    parts = tiny("name=parts", *words)
    before, training_step = signal.getsignal(number), LanguageModel.training_step

    def interrupted(self: LanguageModel, given: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == batch:
            os.kill(os.getpid(), number)
        return training_step(self, given, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(LanguageModel, "training_step", interrupted)
        fit(parts)
    assert stopped.value.code == 75 and signal.getsignal(number) == before
    assert list(checkpoint_steps(folder(parts) / "checkpoints"))[-1] == batch // 2 + 1
    fit(parts)
    assert rows(parts) == rows(whole)
    for name, value in final_state(whole)["state_dict"].items():
        assert torch.equal(value, final_state(parts)["state_dict"][name]), name


@pytest.mark.usefixtures("quick")
def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing_saved(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("checkpoint.every_n_steps=2", "checkpoint.background=false")
    training_step = LanguageModel.training_step

    def interrupted(self: LanguageModel, given: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, given, batch_idx)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        patch.setattr(LanguageModel, "training_step", interrupted)
        fit(config)
    assert not (isinstance(stopped.value, SystemExit) and stopped.value.code == 0)
    assert list(checkpoint_steps(folder(config) / "checkpoints")) == [2]
    assert fit(config)["steps"] == config.trainer.max_steps


@pytest.mark.usefixtures("quick")
def test_a_run_whose_time_is_up_saves_its_step_and_goes_on_with_the_next_start(tiny: Tiny) -> None:
    whole = tiny("name=whole")
    fit(whole)
    config = tiny("name=timed", "trainer.max_time=0.001", "trainer.max_steps=3")
    with pytest.raises(SystemExit) as stopped:
        fit(config)
    assert stopped.value.code == 75
    assert list(checkpoint_steps(folder(config) / "checkpoints")) == [1]
    config = tiny("name=timed")
    fit(config)
    assert rows(config) == rows(whole)


@pytest.mark.usefixtures("quick")
@pytest.mark.multiprocess
def test_sigkill_and_the_same_command_again_finish_the_run(tiny: Tiny, command: Callable[..., list[str]]) -> None:
    longer = ("trainer.max_steps=150", "eval.every_n_steps=50")
    config = tiny("name=killed", *longer)
    whole = tiny("name=whole", *longer)
    fit(whole)
    words = command("name=killed", *longer)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint_steps(folder(config) / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder(config) / "summary.json").exists()
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "killed continues from step" in " ".join(again.stdout.split())
    assert rows(config) == rows(whole)
    assert all(
        torch.equal(final_state(config)["state_dict"][k], v) for k, v in final_state(whole)["state_dict"].items()
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("twice", "dropout"),
    [
        ("data.batch_size=2", 0.1),
        ("trainer.accumulate_grad_batches=2", 0.0),
    ],  # micro-batches drop out differently, by definition
    ids=["batch", "accumulate"],
)
def test_two_ranks_train_like_one_that_reads_twice_as_much(
    twice: str, dropout: float, tiny: Tiny, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    common = ("data.batch_size=1", "trainer.max_steps=6", f"attention.dropout={dropout}")
    two = tiny("name=two", *common)
    done = subprocess.run(  # a hang is an error after the timeout
        command("name=two", *common, "strategy=ddp", "trainer.devices=2"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    assert done.stdout.count("run directory") == 1
    one = tiny("name=one", *common, twice)
    fit(one)
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = final_state(one), final_state(two)
    assert ours["DataModule"] == theirs["DataModule"]
    for name, value in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], value, rtol=0, atol=1e-4)  # of about 1e-3


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_a_compiled_run_follows_the_plain_one_under_the_same_names(tiny: Tiny) -> None:
    plain = tiny("name=plain", "trainer.max_steps=4")
    fit(plain)
    compiled = tiny("name=compiled", "compile=true", "trainer.max_steps=4")
    fit(compiled)
    assert final_state(plain)["state_dict"].keys() == final_state(compiled)["state_dict"].keys()
    assert rows(compiled)[-1]["val_loss"] == pytest.approx(rows(plain)[-1]["val_loss"], rel=1e-4)
