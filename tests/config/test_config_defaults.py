"""One default per field: a class made in Python and the choice of the command line are the same."""

import dataclasses
import inspect
import typing

import pytest
from omegaconf import OmegaConf

from lightsparse.attention.core import AttentionCore
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import conf_dir
from lightsparse.config.schema import Config
from lightsparse.config.targets import resolve
from lightsparse.config.typed import keys_of, value_of
from lightsparse.models import ModelConfig

OURS = ("attention", "data", "model", "optimizer", "schedule", "strategy", "tokenizer")
OTHERS = ("experiment", "hydra", "logger", "shootout")  # recipes, and classes of other packages
FILES = sorted(path for group in OURS for path in (conf_dir() / group).glob("*.yaml"))


def stored(path):
    """The class that a YAML describes, and its keys: those of the YAML it extends, too."""
    node = OmegaConf.to_container(OmegaConf.load(path))
    for base in node.pop("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            node = stored(path.with_name(f"{base}.yaml"))[1] | node
    cls = ModelConfig if path.parent.name == "model" else resolve(node.pop("_target_"), path.stem)
    return cls.Config if issubclass(cls, AttentionCore) else cls, node


def fields_of(cls):
    """Name → annotation and default of what a YAML of this class may have."""
    if not dataclasses.is_dataclass(cls):
        parameters = inspect.signature(cls, eval_str=True).parameters
        return {name: (p.annotation, p.default) for name, p in parameters.items() if name != "params"}
    hints = typing.get_type_hints(cls)
    return {name: (hints[name], default_of(field)) for name, field in keys_of(cls).items()}


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def missing(cls, node, path):
    """What stands in the class or in the YAML alone."""
    fields = fields_of(cls)
    found = [f"{path}.{name}" for name in sorted(fields.keys() ^ node.keys())]
    for name in fields.keys() & node.keys():
        if dataclasses.is_dataclass(fields[name][0]) and "_target_" not in node[name]:
            found += missing(fields[name][0], node[name], f"{path}.{name}")
    return found


def different(cls, node):
    """What has one default in the class and another one in the YAML."""
    both = {name: (default, value_of(kind, node[name], name)) for name, (kind, default) in fields_of(cls).items()}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def test_every_group_of_conf_is_compared():
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == {*OURS, *OTHERS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_a_yaml_has_the_fields_of_its_class_and_no_others(path):
    cls, node = stored(path)
    if cls.__module__.startswith("torch."):  # AdamW: what few runs change is left out
        assert node.keys() <= fields_of(cls).keys()
    else:
        assert missing(cls, node, path.stem) == []


@pytest.mark.parametrize("cls", sorted({stored(path)[0] for path in FILES}, key=str), ids=lambda cls: cls.__name__)
def test_a_class_has_the_defaults_of_its_yaml(cls):
    if cls.__module__.startswith("torch."):
        pytest.skip("a class of torch has torch's defaults")
    assert {} in [different(cls, node) for of, node in map(stored, FILES) if of is cls]  # of one, where it has several


def test_a_variant_made_in_python_is_that_of_the_command_line():
    for path in (conf_dir() / "attention").glob("*.yaml"):
        choice = AttentionChoice.of(OmegaConf.to_container(OmegaConf.load(path)))
        assert choice.config == choice.core.Config()


def test_what_belongs_to_the_run_has_its_defaults_in_config_yaml_alone():
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    groups = {*OURS, "logger"}
    assert (node.keys() | groups) - {"defaults", "hydra"} == keys_of(Config).keys()
    unchecked = [cls for name, (cls, _) in fields_of(Config).items() if name not in groups]
    while unchecked:
        cls = unchecked.pop()
        if dataclasses.is_dataclass(cls):
            assert [name for name, (_, default) in fields_of(cls).items() if default is not dataclasses.MISSING] == []
            unchecked += [kind for kind, _ in fields_of(cls).values()]
    for name, (cls, _) in fields_of(Config).items():
        if dataclasses.is_dataclass(cls) and name not in groups:
            assert missing(cls, node[name], name) == []
