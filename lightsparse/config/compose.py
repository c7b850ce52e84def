"""From command-line overrides to the raw config: Hydra composes conf/, and its errors become one sentence each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightsparse.config.targets import ConfigError, did_you_mean

HYDRA_VERSION = "1.3"  # the behaviour we ask for, whatever 1.x is installed


def conf_dir() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, else the clone's conf/."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose_raw(overrides: Sequence[str]) -> dict[str, Any]:
    """conf/config.yaml under these overrides, interpolations resolved, as plain dicts, lists and values.

    Raises Hydra's own errors; `sentence` puts them in words.
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


def unknown_key(error: Exception) -> str | None:
    """The key of an override that has no place in the composed config, when that is what `error` says."""
    found = re.match(r"Could not override '([^']+)'", str(error))
    return found[1] if found else None


def raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra's own code raised it: its own classes, and bare ones for odd overrides such as attention=3."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_bare = last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")
    return isinstance(error, HydraException) or is_bare


def with_added(overrides: Sequence[str], key: str) -> list[str]:
    """The overrides with `+` before that of `key`, and of every sweep only its first value."""
    lines = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        line = str(override.input_line)
        if override.is_discrete_sweep():
            line = f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
        lines.append(f"+{line}" if override.key_or_group == key and not line.startswith("+") else line)
    return lines


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
