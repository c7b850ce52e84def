"""Hydra raises, tells and takes what compat/hydra.py reads, each shown on Hydra's own errors and objects."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import hydra
import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from lightsparse.config.compose import HYDRA_VERSION, compose_raw, conf_dir
from lightsparse.sweep.launcher import TrialLauncher, register_launcher
from lightsparse.utils.compat import hydra as compat


def raised(*words: str) -> Exception:
    with pytest.raises(Exception) as found:  # bare ones among them
        compose_raw(words)
    return found.value


@pytest.mark.parametrize(
    ("word", "key"),
    [("attention.windw=3", "attention.windw"), ("nothere=1", "nothere"), ("tokenizer@x=bytes", "tokenizer@x")],
    ids=["of a group", "at the top", "of the defaults"],
)
def test_the_unknown_key_is_named(word: str, key: str) -> None:
    error = raised(word)
    assert isinstance(error, HydraException) and compat.unknown_key(error) == key
    assert compat.is_from_hydra(error)


def test_several_values_are_named_with_their_key() -> None:
    error = raised("seed=1,2")
    assert compat.word_with_several_values(error) == "seed=1,2" and compat.unknown_key(error) is None


def test_an_unreadable_word_is_in_the_error() -> None:
    assert compat.unreadable_word(raised("seed=[1")) == "seed=[1"
    assert compat.unreadable_word(raised("seed=1,2")) is None


def test_a_missing_choice_comes_with_those_there_are() -> None:
    missing = compat.missing_choice(raised("schedule=nothere"))
    assert missing == ("schedule", "nothere", ["constant", "cosine", "wsd"])
    assert compat.missing_choice(raised("seed=1,2")) is None


def test_bare_errors_of_hydra_are_told_from_others() -> None:
    error = raised("attention=3")
    assert not isinstance(error, HydraException) and compat.is_from_hydra(error)
    with pytest.raises(ValueError) as other:
        int("x")
    assert not compat.is_from_hydra(other.value) and compat.unknown_key(other.value) is None


def test_an_interpolation_that_leads_nowhere_has_a_place() -> None:
    with pytest.raises(InterpolationKeyError) as error:
        OmegaConf.to_container(OmegaConf.create({"a": {"b": "${c}"}}), resolve=True)
    assert compat.place_of(error.value) == "a.b"


def test_overrides_are_read_as_hydra_reads_them() -> None:
    words = ["seed=3", "attention.windw=1,2", "+attention.windw=4", "data.context=choice(64,128)", "x=interval(0,1)"]
    assert compat.single_words(words) == ["seed=3", "attention.windw=1", "+attention.windw=4", "data.context=64"]


@pytest.fixture
def hydra_config() -> Iterator[HydraConfig]:
    config = HydraConfig.instance()
    before = config.cfg
    yield config
    config.cfg = before


@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_a_job_inside_a_sweep_is_recognised(mode: str, hydra_config: HydraConfig) -> None:
    hydra_config.cfg = None
    assert not compat.is_sweep()
    with hydra.initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION):
        hydra_config.set_config(hydra.compose("config", [f"hydra.mode={mode}"], return_hydra_config=True))
    assert compat.is_sweep() == (mode == "MULTIRUN")


def test_a_launcher_is_known_once_it_is_added() -> None:
    register_launcher()
    assert TrialLauncher in Plugins.instance().discover(Launcher)


def test_the_config_of_a_trial_is_made_from_the_sweeps() -> None:
    assert list(inspect.signature(ConfigLoader.load_sweep_config).parameters) == [
        *("self", "master_config", "sweep_overrides"),
    ]


def test_a_result_gives_its_value_back() -> None:
    result = compat.result_of_trial(["seed=1"], 0.5)
    assert result.return_value == 0.5 and list(result.overrides or ()) == ["seed=1"]
