"""From config nodes to objects: what is refused, and in which words."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, Timer
from lightning.pytorch.loggers import Logger
from torch.optim import AdamW, Optimizer

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionShape
from lightsparse.config.build import AttentionChoice, ClassChoice
from lightsparse.config.targets import ConfigError, resolve
from lightsparse.config.typed import typed
from lightsparse.patterns import LocalWindow, Pattern

EVIL = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "posix.system",
    "lightning.pytorch.os.system",  # the package of a harmless-looking prefix
    "lightning.pytorch.callbacks.os.system",
    "lightning.pytorch.callbacks.model_checkpoint.os",
    "lightning.pytorch.callbacks.model_checkpoint.Path",  # a class, but pathlib's
    "lightning.pytorch.loggers.wandb.os.system",
    "lightning.pytorch.loggersevil.Thing",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.cli.LightningCLI",
    "torch.hub.load",
    "torch.load",
    "torch.optim.lr_scheduler.warnings",
    "torch.optim.lr_scheduler.warnings.catch_warnings",
    "torch.optim.lr_scheduler.partial",
    "torch.optim.lr_scheduler.Counter",  # a class, but collections'
    "torch.optim.AdamW.mro",  # a method
    "torch.optim.AdamW.__init__",
    "torch.optim.adamw.adamw",  # a function
    "torch.optim._functional.adamw",  # private
    "torch.optim",  # a package
    "torch.nn.init",
    "torch.nn.functional.relu",
    "torch.nn.Module.__class__",
    "torch.nn.modules.module.Any",
    "lightsparse.__main__.main",
    "lightsparse.config.targets.importlib",
    "lightsparse.config.targets.resolve",
    "lightsparse.config.compose.hydra.utils.instantiate",
    "lightsparse.nowhere.Thing",
    "lightsparse",
    "torch.optim.AdamW ",
    "torch.optim..AdamW",
    ".os.system",
    "",
    None,
    3,
    ["os.system"],
]


@pytest.mark.parametrize("target", EVIL, ids=str)
def test_only_classes_defined_in_the_allowed_packages_resolve(target):
    with pytest.raises(ConfigError, match=r"^x\._target_ is"):
        resolve(target, "x")


@pytest.mark.parametrize("target", EVIL, ids=str)
def test_a_refused_target_is_refused_wherever_it_is_nested(target):
    for value in ({"_target_": target}, [{"_target_": target}], {"deep": [{"er": {"_target_": target}}]}):
        node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "offline": True, "config": value}
        with pytest.raises(ConfigError, match="_target_ is"):
            ClassChoice.of(node, "logger.w", Logger)


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "torch.optim.adamw.AdamW",
        "torch.nn.Linear",
        "lightning.pytorch.loggers.WandbLogger",
        "lightning.pytorch.callbacks.Timer",
        "lightning.pytorch.profilers.SimpleProfiler",
        "lightsparse.patterns.LocalWindow",
    ],
)
def test_classes_of_the_allowed_packages_resolve(target):
    assert resolve(target, "x").__name__ == target.rsplit(".", 1)[1]


def test_a_name_outside_the_packages_is_refused_before_anything_is_imported(tmp_path):
    (tmp_path / "landmine.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w').close()\nclass Thing: pass\n")
    code = (
        "from lightsparse.config.targets import ConfigError, resolve\n"
        "for name in ('landmine.Thing', 'landmine.x.Thing', 'lightning.pytorch.landmine.Thing'):\n"
        "    try:\n        resolve(name, 'x')\n    except ConfigError:\n        continue\n"
        "    raise SystemExit(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=_env(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "exploded").exists()


def _env(*paths):
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, sys.path)])}


def test_the_allow_list_takes_classes_and_modules_but_no_functions(tmp_path, monkeypatch):
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text("from mylab.parts import Watch\n")
    (tmp_path / "mylab" / "parts.py").write_text("from pathlib import Path\nclass Watch: pass\ndef act(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target, allow in [
        ("mylab.parts.Watch", "mylab.parts.Watch"),
        ("mylab.parts.Watch", "mylab.parts"),
        ("mylab.Watch", "mylab"),
        ("mylab.Watch", "mylab.Watch"),
    ]:
        assert resolve(target, "x", (allow,)).__name__ == "Watch"
    for target, allow in [
        ("mylab.parts.Watch", "mylab.part"),
        ("mylab.parts.act", "mylab.parts.act"),
        ("mylab.parts.Path", "mylab.parts"),
        ("mylab.parts", "mylab.parts"),
    ]:
        with pytest.raises(ConfigError):
            resolve(target, "x", (allow,))


def test_a_misspelt_class_is_met_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean LocalWindow\?"):
        resolve("lightsparse.patterns.LocalWindo", "attention.pattern.near")


@dataclass(frozen=True)
class Inner:
    depth: int = 1

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"outer.inner.depth is {self.depth}; it must be at least 1")


@dataclass(frozen=True)
class Outer:
    share: float
    mode: Literal["a", "b"] = "a"
    on: bool = False
    limit: int | None = None
    sizes: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    inner: Inner = Inner()
    pattern: dict[str, Pattern | None] = field(default_factory=dict)


def test_a_node_becomes_its_dataclass():
    node = {
        "share": 1,
        "mode": "b",
        "limit": None,
        "sizes": [1, 2],
        "betas": [0, 0.5],
        "inner": {"depth": 3},
        "pattern": {"near": {"_target_": "lightsparse.patterns.LocalWindow", "window": 2}, "far": None},
    }
    got = typed(Outer, node, "outer")
    assert got == Outer(1.0, "b", False, None, (1, 2), (0.0, 0.5), Inner(3), {"near": LocalWindow(2), "far": None})
    assert isinstance(got.share, float)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"shar": 1.0}, "outer.shar is not a key; did you mean outer.share?"),
        (
            {"share": 1.0, "zzz": 1},
            "outer.zzz is not a key; outer has share, mode, on, limit, sizes, betas, inner, pattern",
        ),
        ({}, "outer.share is missing"),
        ({"share": "???"}, "outer.share has no value yet; give it one: outer.share=…"),
        ({"share": "fast"}, "outer.share is 'fast'; it must be a number"),
        ({"share": True}, "outer.share is true; it must be a number"),
        ({"share": float("nan")}, "outer.share is nan; it must be a number"),
        ({"share": None}, "outer.share is null; it must be a number"),
        ({"share": 1, "mode": "c"}, "outer.mode is 'c'; it must be one of a, b"),
        ({"share": 1, "on": 1}, "outer.on is 1; it must be true or false"),
        ({"share": 1, "limit": 1.5}, "outer.limit is 1.5; it must be an integer or null"),
        ({"share": 1, "limit": True}, "outer.limit is true; it must be an integer or null"),
        ({"share": 1, "betas": [0.9]}, "outer.betas is [0.9]; it must be a list of 2, each a number"),
        ({"share": 1, "sizes": 3}, "outer.sizes is 3; it must be a list, each an integer"),
        ({"share": 1, "sizes": [3, "x"]}, "outer.sizes[1] is 'x'; it must be an integer"),
        ({"share": 1, "inner": 3}, "outer.inner is 3; it must be a group of keys: depth"),
        ({"share": 1, "inner": {"depht": 1}}, "outer.inner.depht is not a key; did you mean outer.inner.depth?"),
        ({"share": 1, "inner": {"depth": 0}}, "outer.inner.depth is 0; it must be at least 1"),
        (
            {"share": 1, "pattern": {"near": {"_target_": "torch.nn.Linear"}}},
            "outer.pattern.near._target_ is torch.nn.Linear; it must be a subclass of Pattern",
        ),
        (3, "outer is 3; it must be a group of keys: share, mode, on, limit, sizes, betas, inner, pattern"),
    ],
    ids=str,
)
def test_a_wrong_node_is_one_sentence_with_place_value_and_rule(node, says):
    with pytest.raises(ConfigError) as caught:
        typed(Outer, node, "outer")
    assert str(caught.value) == says


def test_a_rule_broken_inside_a_pattern_names_its_place():
    node = {"share": 1, "pattern": {"near": {"_target_": "lightsparse.patterns.LocalWindow", "window": 0}}}
    with pytest.raises(ConfigError, match=r"^outer.pattern.near: .*window is 0"):
        typed(Outer, node, "outer")


def test_attention_is_a_core_with_its_own_checked_config():
    choice = AttentionChoice.of({"_target_": f"{__name__}.StandIn", "density": 0.5, "width": 2}, (__name__,))
    core = choice.build(AttentionShape(heads=2, kv_heads=2, head_dim=4, embed_dim=8))
    assert isinstance(core, StandIn) and core.config == StandInConfig(density=0.5, width=2)
    assert choice.name == __name__.rsplit(".", 1)[-1]
    for wrong, says in [
        ({"density": 2.0}, "attention.density is 2.0"),
        ({"widht": 2}, "did you mean attention.width"),
        ({"width": "2"}, "attention.width is '2'"),
    ]:
        with pytest.raises(ConfigError, match=says):
            AttentionChoice.of({"_target_": f"{__name__}.StandIn"} | wrong, (__name__,))
    with pytest.raises(ConfigError, match="must be a subclass of AttentionCore"):
        AttentionChoice.of({"_target_": "torch.nn.Linear"})
    with pytest.raises(ConfigError, match=r"set model\.kv_heads=2"):
        choice.build(AttentionShape(heads=2, kv_heads=1, head_dim=4, embed_dim=8))


@dataclass(frozen=True)
class StandInConfig(AttentionConfig):
    width: int = 1


class StandIn(AttentionCore):
    Config = StandInConfig
    supports_gqa = False


def test_an_optimizer_trains_the_very_parameters_it_is_given():
    choice = ClassChoice.of({"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.99]}, "optimizer", Optimizer)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = choice.build([{"params": [weight], "weight_decay": 0.0}])
    assert isinstance(optimizer, AdamW)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lr": "fast"}, r"optimizer.lr is 'fast'; it must be a number"),
        ({"lrr": 1.0}, r"optimizer.lrr is not a key; did you mean optimizer.lr\?"),
        ({"betas": [0.9, "x"]}, r"optimizer.betas\[1\] is 'x'; it must be a number"),
        ({"lr": -1.0}, r"optimizer: Invalid learning rate: -1.0"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_an_optimizer_is_one_sentence(arguments, says):
    with pytest.raises(ConfigError, match=f"^{says}$|^{says};"):
        node = {"_target_": "torch.optim.AdamW"} | arguments
        ClassChoice.of(node, "optimizer", Optimizer).build([torch.nn.Parameter(torch.ones(1))])


def test_a_callback_is_built_with_nested_parts_and_the_runs_own_arguments():
    node = {"_target_": "lightning.pytorch.callbacks.Timer", "duration": {"hours": 1}}
    timer = ClassChoice.of(node, "callbacks.t", Callback).build(interval="epoch")
    assert isinstance(timer, Timer) and timer.time_remaining() == 3600
    assert isinstance(
        ClassChoice.of({"_target_": "lightning.pytorch.callbacks.ModelSummary"}, "c", Callback).build(), ModelSummary
    )


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_target_": "torch.nn.Linear"}, "must be a subclass of Callback"),
        ({"duration": 3}, "must be a group of keys with a _target_"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "_args_": [1]}, "_args_ is not a key"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "_partial_": True}, "_partial_ is not a key"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "duration": {"_args_": [1]}}, "_args_ is not a key"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "duration": "${oc.env:HOME}"}, "interpolation"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "interval": "year"}, "callbacks.t: .*year"),
    ],
    ids=str,
)
def test_a_wrong_callback_is_one_sentence(node, says):
    with pytest.raises(ConfigError, match=says):
        ClassChoice.of(node, "callbacks.t", Callback).build()


def test_a_callback_gets_the_groups_of_its_arguments_as_yaml_has_them():
    node = {"_target_": "lightning.pytorch.callbacks.GradientAccumulationScheduler", "scheduling": {0: 4, 8: 2}}
    assert ClassChoice.of(node, "callbacks.g", Callback).build().scheduling == {0: 4, 8: 2}


def test_classes_nested_in_arguments_are_built_with_them():
    node = {
        "_target_": f"{__name__}.Holder",
        "parts": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}],
    }
    choice = ClassChoice.of(node, "callbacks.h", Callback, (__name__,))
    assert [part.weight.shape for part in choice.build().parts] == [(3, 2)]
    node["parts"][0]["in_featuers"] = 2
    with pytest.raises(ConfigError, match=r"^callbacks\.h\.parts\[0\]\.in_featuers is not a key; did you mean"):
        ClassChoice.of(node, "callbacks.h", Callback, (__name__,))


class Holder(Callback):
    def __init__(self, parts):
        self.parts = parts


def test_to_read_a_config_takes_no_lightning_and_to_refuse_a_value_no_torch():
    code = (
        "import sys\n"
        "import lightsparse.config.compose, lightsparse.config.eval_plan, lightsparse.config.typed\n"
        "assert not {'torch', 'lightning', 'pydantic'} & sys.modules.keys()\n"
        "import lightsparse.config.context_split, lightsparse.config.parse\n"
        "assert 'lightning' not in sys.modules\n"
        "lightsparse.config.parse.compose([])\n"
        "assert 'lightning' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=_env(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
