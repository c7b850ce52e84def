"""Loggers beside metrics.csv: several at once, with the same rows, and the plots at the end."""

import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.run import fit


def test_tensorboard_and_wandb_together_get_the_rows_of_metrics_csv_and_the_plots(tiny, tmp_path, monkeypatch):
    wandb.teardown()  # it has read the environment, if a test before this one used it
    monkeypatch.setenv("WANDB_RUN_GROUP", "a-sweep")
    config = tiny("logger=all", "trainer.max_steps=4", "schedule=constant", "eval.sample_tokens=0")
    fit(config)
    assert wandb.run is not None and wandb.run.group == "a-sweep"
    wandb.finish()
    run = tmp_path / "runs/tiny"
    assert list(run.glob("wandb/offline-run-*/files/media/images/loss_*.png"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = {int(row["step"]): row for row in read_metrics(run / "metrics.csv")}
    sent = {event.step: event.value for event in events.Scalars("val_bits_per_byte")}
    assert sent.keys() == {step for step, row in rows.items() if "val_bits_per_byte" in row} and 4 in sent
    assert all(abs(rows[step]["val_bits_per_byte"] - value) < 1e-5 for step, value in sent.items())
    assert {"loss", "loss_by_position"} <= set(events.Tags()["images"])


def test_a_logger_that_is_added_at_a_restart_gets_the_rows_of_all_starts_and_the_others_none_twice(tiny, tmp_path):
    words = ("schedule=constant", "eval.sample_tokens=0", "trainer.log_every_n_steps=1")
    first = "+logger.first={_target_: lightning.pytorch.loggers.TensorBoardLogger, name: first, version: ''}"
    fit(tiny(*words, first, "trainer.max_steps=3"))
    fit(tiny(*words, first, first.replace("first", "second"), "trainer.max_steps=5"))
    run = tmp_path / "runs/tiny"
    steps = [row["step"] for row in read_metrics(run / "metrics.csv")]
    for name in ("first", "second"):
        events = EventAccumulator(str(run / name))
        events.Reload()
        assert [event.step for event in events.Scalars("tokens")] == steps == [0, 1, 2, 3, 4, 5]
