"""From words on a command line to the raw config: Hydra composes conf/, and its errors become one sentence each.

Needs no torch: a wrong key or choice is refused before anything heavy is imported. What conf/ has for a group is all
that its schema takes (a test holds that), so the composed config tells which key is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightsparse.config.targets import ConfigError, did_you_mean
from lightsparse.config.unknown_key import about_unknown_key
from lightsparse.utils.compat.hydra import (
    is_from_hydra,
    missing_choice,
    place_of,
    single_words,
    unknown_key,
    unreadable_word,
    word_with_several_values,
)

HANDED = "LIGHTSPARSE_CONFIG"  # the variable in which a process hands its composed config to one that it starts
_LONGEST = 2**17 - len(HANDED) - 2  # bytes of its value that Linux takes
HYDRA_VERSION = "1.3"  # the behaviour we ask for, whatever 1.x is installed


def conf_dir() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, else the clone's conf/."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def composed(overrides: Sequence[str], own: Sequence[str] = ()) -> dict[str, Any]:
    """`compose_raw`; raises ConfigError for what Hydra refuses. own: see `refused_in_words`."""
    with refused_in_words(overrides, own):
        return compose_raw(overrides)


def compose_raw(overrides: Sequence[str]) -> dict[str, Any]:
    """conf/config.yaml under these overrides, interpolations resolved, as plain dicts, lists and values.

    Raises Hydra's own errors.
    """
    with hydra.initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION):
        return plain(hydra.compose("config", list(overrides)))


def plain(composed: DictConfig) -> dict[str, Any]:
    """The composed config as plain dicts. Raises ConfigError for an interpolation that leads nowhere."""
    try:
        resolved = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{place_of(error)}: {_first_line(error)}") from error
    assert isinstance(resolved, dict)  # conf/config.yaml is a mapping
    return {str(key): _at_home(value, str(key)) for key, value in resolved.items()}


def _at_home(node: Any, key: str) -> Any:
    """With ~/ at the start of a value as a shell reads it: in a YAML, or in quotes, no shell does."""
    if isinstance(node, dict):
        return {name: _at_home(value, f"{key}.{name}") for name, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value, key) for value in node]
    if not isinstance(node, str) or not node.startswith("~/"):
        return node
    path = os.path.expanduser(node)
    if path == node:
        raise ConfigError(f"{key} is {node}, and this user has no home directory; write the path from / on")
    return path


def handing(composed: Mapping[str, Any]) -> dict[str, str]:
    """The variable for a process that shall run this very config, whatever its words would compose to by then.

    Raises ConfigError where the system does not take it for its length.
    """
    text = yaml.safe_dump(dict(composed), sort_keys=False)
    if len(text.encode()) > _LONGEST:
        raise ConfigError(
            f"the composed config has {len(text.encode())} bytes, and a process that this one starts can be handed "
            f"{_LONGEST}; name files by a pattern instead of a list"
        )
    return {HANDED: text}


def handed() -> dict[str, Any] | None:
    """The composed config that this process was handed, once; None where it has words to compose."""
    text = os.environ.pop(HANDED, None)
    return None if text is None else yaml.safe_load(text)


@contextmanager
def refused_in_words(overrides: Sequence[str], own: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra raises within, as it composes these overrides, into a ConfigError of one sentence.

    own  keys of the command itself, beside those of conf/
    """
    try:
        yield
    except Exception as error:
        if not is_from_hydra(error):
            raise
        raise ConfigError(explain(error, overrides, own)) from error


def explain(error: Exception, overrides: Sequence[str], own: Sequence[str] = ()) -> str:
    """What went wrong as Hydra composed these overrides, in one sentence. own: see `refused_in_words`."""
    key = unknown_key(error)
    if key is None or key.startswith("hydra."):
        return sentence(error)
    try:
        raw = _composed_without(key, overrides)
    except HydraException as other:
        return sentence(other)
    value = next((value for name, _, value in (word.partition("=") for word in overrides) if name == key), "")
    return about_unknown_key(key, value, raw, conf_dir(), own)


def _composed_without(key: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Without the override of `key`, any other that reaches nothing, and all values of a sweep but the first."""
    kept = [word for word in single_words(overrides) if word.partition("=")[0] != key]
    try:
        return compose_raw(kept)
    except HydraException as error:
        another = unknown_key(error)
        if another is None or len(kept) == len(overrides):
            raise
        return _composed_without(another, kept)


def sentence(error: Exception) -> str:
    """What went wrong while composing, in one sentence."""
    unreadable, missing, several = unreadable_word(error), missing_choice(error), word_with_several_values(error)
    if unreadable is not None:
        return (
            f"{unreadable} cannot be read as an override; write key=value, "
            "and put lists and values with spaces in quotes: 'key=[1,2]'"
        )
    if missing is not None:
        group, choice, options = missing
        has = ", ".join(options) or "no such file"
        return f"{group} is {choice}; conf/{group} has {has}{did_you_mean(choice, options)}"
    if several is not None:
        key, _, values = several.partition("=")
        return f"{several} gives several values; add -m to run one after the other, or write '{key}=[{values}]'"
    if not isinstance(error, HydraException):
        return f"Hydra: {_first_line(error)}; write group=<name of a file in conf/group> or key=value"
    lines = [_first_line(each) for each in (error, error.__cause__) if each is not None]
    return ": ".join(line for line in lines if line)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
