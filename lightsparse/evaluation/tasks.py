"""The tasks of conf/data/, fitted to a model: in its tokens, within what it can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omegaconf import OmegaConf

from lightsparse.config.compose import conf_dir
from lightsparse.config.targets import ConfigError
from lightsparse.config.typed import chosen
from lightsparse.data.source import DataConfig
from lightsparse.data.tasks.needles import Needles
from lightsparse.data.tasks.task import TaskConfig
from lightsparse.data.text import TextConfig
from lightsparse.data.tokenizer import Bytes
from lightsparse.data.tokens import Tokenizer
from lightsparse.evaluation.subject import Subject

OWN = "own"  # the task that a model was trained on
_FOLDER = "lightsparse.data.tasks."


def task_named(name: str, tokenizer: Tokenizer, data: DataConfig | None) -> TaskConfig:
    """The task of conf/data/<name>.yaml in these tokens, or `own`.

    data  what the model was trained on: needles hide in its validation text. None = unknown
    Raises ConfigError for a name that is no task.
    """
    if name == OWN:
        if not isinstance(data, TaskConfig):
            raise ConfigError("tasks names own, but the run was not trained on a task; name tasks of conf/data/")
        return data
    found = _stored(name)
    if isinstance(found, Needles) and found.haystack == "essay" and isinstance(data, TextConfig):
        found = replace(found, essays=replace(data, tokenizer=Bytes()))
    fitted = found.with_tokenizer(tokenizer)
    assert isinstance(fitted, TaskConfig)  # the same task
    return fitted


def _stored(name: str) -> TaskConfig:
    """As conf/data/<name>.yaml has it: read by itself, since Hydra composes one config at a time."""
    nodes = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in conf_dir().glob("data/*.yaml")}
    tasks = {stem: node for stem, node in nodes.items() if isinstance(node, dict) and _FOLDER in node["_target_"]}
    if name not in tasks:
        raise ConfigError(f"tasks names {name}, which is none; there are {OWN}, {', '.join(sorted(tasks))}")
    return chosen(TaskConfig, tasks[name], "data")


def check_fit(task: TaskConfig, name: str, lengths: Sequence[int], subject: Subject) -> None:
    """Raises ConfigError where the model lacks the task's ids, or cannot read as many tokens."""
    if task.vocab_size > subject.vocab_size:
        raise ConfigError(
            f"tasks names {name}, whose {task.vocab_size} ids the model does not have ({subject.vocab_size}); "
            "evaluate it on a model trained on that task"
        )
    if subject.longest is not None and max(lengths) > subject.longest:
        raise ConfigError(
            f"lengths has {max(lengths)}, but the model has learned {subject.longest} positions; leave it out"
        )
