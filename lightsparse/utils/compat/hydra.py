"""Hydra (1.3) and omegaconf: undocumented names that we touch, and Hydra's messages that we match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

# ---- what an error says: there are few types, and fewer fields ---------------------------------------------------


def is_from_hydra(error: Exception) -> bool:
    """Whether Hydra's own code raised it: its own classes, and bare ones for odd overrides such as attention=3."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_bare = last is not None and last.tb_frame.f_globals["__name__"].startswith("hydra.")
    return isinstance(error, HydraException) or is_bare


def unknown_key(error: Exception) -> str | None:
    """The key of an override that has no place in the composed config, when that is what it says."""
    found = re.match(r"Could not override '([^']+)'", str(error))
    return found[1] if found else None


def word_with_several_values(error: Exception) -> str | None:
    """key=1,2 without -m, when that is what it says."""
    found = re.match(r"Ambiguous value for argument '(.+)'", str(error))
    return found[1] if found else None


def unreadable_word(error: Exception) -> str | None:
    """The word that is no override, when that is what it says."""
    return error.override if isinstance(error, OverrideParseException) else None


def missing_choice(error: Exception) -> tuple[str, str, list[str]] | None:
    """(group, choice, choices there are), when it says that a group has no such file."""
    if not isinstance(error, MissingConfigException) or not error.missing_cfg_file:
        return None
    group, _, choice = error.missing_cfg_file.rpartition("/")
    return group, choice, list(error.options or ())


def place_of(error: OmegaConfBaseException) -> str:
    """The dotted key at which an interpolation leads nowhere."""
    return str(error.full_key)


# ---- overrides and sweeps ---------------------------------------------------------------------------------------


def single_words(overrides: Sequence[str]) -> list[str]:
    """The overrides, of every sweep over listed values only the first, and none of another sweep.

    `hydra.compose` takes words and tells nothing of how it reads them.
    """
    words = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_discrete_sweep():
            words.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            words.append(str(override.input_line))
    return words


def varied_words(overrides: Sequence[str], command: Sequence[str]) -> list[str]:
    """The overrides of a trial that its sweep has chosen: those that the command does not say, in whatever spelling."""

    def read(words: Sequence[str]) -> list[tuple[str, str]]:
        parsed = OverridesParser.create().parse_overrides(list(words))
        return [(override.get_key_element(), repr(override.value())) for override in parsed]

    fixed = set(read(command))
    return [word for word, value in zip(overrides, read(overrides), strict=True) if value not in fixed]


def is_sweep() -> bool:
    """Whether this is a job of -m that runs inside the sweep's process."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def add_launcher(kind: type[Launcher]) -> None:
    """Make a launcher known after Hydra may have looked for plugins, which it does once."""
    Plugins.instance().register(kind)


@contextmanager
def config_of_trial(
    context: HydraContext, config: DictConfig, overrides: Sequence[str], number: int
) -> Iterator[DictConfig]:
    """The composed config of the trial of a sweep with this number from 0. Only the example of a launcher documents it.

    Within, ${hydra:job.num} and its like are this trial's, as in Hydra's own launchers.
    """
    composed = context.config_loader.load_sweep_config(config, list(overrides))
    with read_write(composed), open_dict(composed):
        composed.hydra.job.num, composed.hydra.job.id = number, f"job_id_for_{number}"
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        yield composed
    finally:
        HydraConfig.instance().cfg = before


def result_of_trial(overrides: Sequence[str], value: Any) -> JobReturn:
    """What a launcher gives back to the sweeper; `_return_value` is what its property reads."""
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
