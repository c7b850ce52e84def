"""Lightning asks for, keeps and says what compat/lightning.py and our strategies rely on, shown on its own trainer."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer import setup
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.connectors.logger_connector import result

from lightsparse.distributed.launcher import RankLauncher
from lightsparse.distributed.strategies import GridStrategy, ReplicatedStrategy, ShardedStrategy
from lightsparse.training.lightning_warnings import quiet_lightning
from lightsparse.utils.compat import lightning as compat
from lightsparse.utils.compat.torch import FSDP_VIEW

# ---- strategies -------------------------------------------------------------------------------------------------

# What ours define anew; under another name Lightning would call its own and say nothing.
OVERRIDDEN = {
    (GridStrategy, ParallelStrategy): ("launcher", "on_exception", "distributed_sampler_kwargs"),
    (ReplicatedStrategy, DDPStrategy): ("setup_distributed", "setup_environment", "configure_ddp"),
    (ShardedStrategy, ModelParallelStrategy): (
        *("setup_environment", "device_mesh", "lightning_restore_optimizer", "lightning_module_state_dict"),
        *("optimizer_state", "save_checkpoint", "load_checkpoint", "load_model_state_dict"),
        "load_optimizer_state_dict",
    ),
}


@pytest.mark.parametrize(
    ("ours", "theirs", "name"), [(*pair, name) for pair, names in OVERRIDDEN.items() for name in names]
)
def test_an_overridden_name_is_lightnings(ours: type, theirs: type, name: str) -> None:
    assert name in vars(ours)
    mine, base = (inspect.getattr_static(kind, name) for kind in (ours, theirs))
    if inspect.isfunction(base):
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(base).parameters)


def test_nothing_else_is_overridden() -> None:
    for (ours, theirs), names in OVERRIDDEN.items():
        shared = {name for name in vars(ours) if hasattr(theirs, name) and not name.startswith("__")}
        assert shared - {"_abc_impl"} == set(names)


def test_a_launcher_is_asked_for_three_things() -> None:
    asked = {"launch", "kill", "is_interactive_compatible"}
    assert compat.Launcher.__abstractmethods__ == asked and not RankLauncher.__abstractmethods__
    for name in ("launch", "kill"):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (RankLauncher, compat.Launcher))
        assert list(ours)[:2] == list(theirs)[:2]


def test_setup_distributed_meets_the_ranks() -> None:
    source = inspect.getsource(ModelParallelStrategy._setup_distributed)
    assert list(inspect.signature(ModelParallelStrategy._setup_distributed).parameters) == ["self"]
    assert "_init_dist_connection" in source and "mesh" not in source


# ---- checkpoints ------------------------------------------------------------------------------------------------


class Data(BoringDataModule):
    def state_dict(self) -> dict[str, Any]:
        return {"consumed": 12}


def trainer(folder: Path, **more: Any) -> Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(default_root_dir=folder, enable_model_summary=False, **(options | more))  # type: ignore[arg-type]


def saved(folder: Path) -> Path:
    """The checkpoint of three steps, each of two micro-batches, of an epoch of 64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = trainer(folder, max_steps=3, accumulate_grad_batches=2, limit_val_batches=0)
        short.fit(BoringModel(), datamodule=Data())
        short.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def test_a_checkpoint_counts_micro_batches_and_holds_the_data_modules_state(tmp_path: Path) -> None:
    checkpoint = torch.load(saved(tmp_path), weights_only=True)
    run, epoch = compat.batch_counts(checkpoint)
    for counts in (run, epoch):
        assert {name: counts[name] for name in ("ready", "started", "processed", "completed")} == dict.fromkeys(
            ("ready", "started", "processed", "completed"), 6
        )
    assert compat.datamodule_state(checkpoint, Data()) == {"consumed": 12}
    run["ready"] = 99
    assert compat.batch_counts(checkpoint)[0]["ready"] == 99


# ---- messages ---------------------------------------------------------------------------------------------------


def fits(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 8)  # as on a larger machine
    trainer(folder, fast_dev_run=True).fit(BoringModel())


def resumes(folder: Path, patch: pytest.MonkeyPatch) -> None:
    again = trainer(folder, max_steps=4, accumulate_grad_batches=2, limit_val_batches=0)
    again.fit(BoringModel(), datamodule=Data(), ckpt_path=saved(folder), weights_only=True)


def starts_beside_a_gpu(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(setup.CUDAAccelerator, "is_available", staticmethod(lambda: True))
    trainer(folder)


def logs_into_a_folder_with_files(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "logs/version_0").mkdir(parents=True)
    (folder / "logs/version_0/metrics.csv").touch()
    _ = CSVLogger(folder, name="logs", version=0).experiment


def keeps_checkpoints_in_a_folder_with_files(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "kept").touch()
    kept = trainer(folder, max_steps=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(folder)])
    kept.fit(BoringModel())


def logs_what_ranks_have_summed_already(folder: Path, patch: pytest.MonkeyPatch) -> None:
    class Logs(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", torch.ones(()))

    patch.setattr(result, "_distributed_is_initialized", lambda: True)
    trainer(folder, limit_val_batches=1, limit_train_batches=1, max_steps=1).fit(Logs())


SAYS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    r".*does not have many workers which may be a bottleneck.*": fits,
    r".*dataloader is not resumable.*": resumes,
    r".*GPU available but not used.*": starts_beside_a_gpu,
    r".*Experiment logs directory .* exists and is not empty.*": logs_into_a_folder_with_files,
    r".*Checkpoint directory .* exists and is not empty.*": keeps_checkpoints_in_a_folder_with_files,
    r".*isinstance\(treespec, LeafSpec\).*": fits,
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*": logs_what_ranks_have_summed_already,
}


def said(tip: str, folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        SAYS[tip](folder, patch)
    return [str(each.message) for each in found]


@pytest.mark.parametrize("tip", compat.TIPS)
def test_lightning_says_the_tip(tip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = said(tip, tmp_path, monkeypatch)
    assert any(re.match(tip, message) for message in messages), messages


def test_quiet_lightning_silences_the_tips_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in compat.LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        quiet_lightning()
        silenced = {each[1].pattern for each in warnings.filters if each[0] == "ignore" and each[1] is not None}
    assert silenced == {*compat.TIPS, FSDP_VIEW}
    assert all(logging.getLogger(name).level == logging.WARNING for name in compat.LOGGERS)


@pytest.mark.parametrize("name", compat.LOGGERS)
def test_what_every_start_tells_comes_from_these_loggers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=name):
        seed_everything(0)
        trainer(tmp_path)
    assert any(record.name.startswith(f"{name}.") for record in caplog.records)
