"""From words on a command line to the raw config: Hydra composes conf/, and its errors become one sentence each.

Needs no torch: a wrong key or choice is refused before anything heavy is imported. What conf/ has for a group is all
that its schema takes (a test holds that), so the composed config tells which key is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightsparse.config.targets import ConfigError, did_you_mean
from lightsparse.config.unknown_key import about_unknown_key

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
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(resolved, dict)  # conf/config.yaml is a mapping
    return {str(key): value for key, value in resolved.items()}


@contextmanager
def refused_in_words(overrides: Sequence[str], own: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra raises within, as it composes these overrides, into a ConfigError of one sentence.

    own  keys of the command itself, beside those of conf/
    """
    try:
        yield
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        raise ConfigError(explain(error, overrides, own)) from error


def raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra's own code raised it: its own classes, and bare ones for odd overrides such as attention=3."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_bare = last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")
    return isinstance(error, HydraException) or is_bare


def unknown_key(error: Exception) -> str | None:
    """The key of an override that has no place in the composed config, when that is what `error` says."""
    found = re.match(r"Could not override '([^']+)'", str(error))
    return found[1] if found else None


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
    kept = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_discrete_sweep():
            kept.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            kept.append(str(override.input_line))
    kept = [word for word in kept if word.partition("=")[0] != key]
    try:
        return compose_raw(kept)
    except HydraException as error:
        another = unknown_key(error)
        if another is None or len(kept) == len(overrides):
            raise
        return _composed_without(another, kept)


def sentence(error: Exception) -> str:
    """What went wrong while composing, in one sentence."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as an override; write key=value, "
            "and put lists and values with spaces in quotes: 'key=[1,2]'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = list(error.options or ())
        return f"{group} is {choice}; conf/{group} has {', '.join(options) or 'no such file'}" + did_you_mean(
            choice, options
        )
    if not isinstance(error, HydraException):
        return f"Hydra: {_first_line(error)}; write group=<name of a file in conf/group> or key=value"
    several = re.match(r"Ambiguous value for argument '(.+)'", str(error))
    if several:
        key, _, values = several[1].partition("=")
        return f"{several[1]} gives several values; add -m to run one after the other, or write '{key}=[{values}]'"
    lines = [_first_line(each) for each in (error, error.__cause__) if each is not None]
    return ": ".join(line for line in lines if line)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
