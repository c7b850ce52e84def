"""From command-line overrides to the raw config: Hydra composes conf/, and its errors become one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightsparse.config.targets import ConfigError, did_you_mean
from lightsparse.utils.compat.hydra import missing_choice, place_of, unreadable_word, word_with_several_values

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
        raise ConfigError(f"{place_of(error)}: {_first_line(error)}") from error
    assert isinstance(resolved, dict)  # conf/config.yaml is a mapping
    return {str(key): value for key, value in resolved.items()}


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
