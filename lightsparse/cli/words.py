"""From words on a command line to a call, for every command: its options, its help, what it says when it refuses.

A command's module says in its docstring what `--help` prints and in a frozen dataclass which options it takes. Nothing
here needs torch, so that a wrong word is refused at once; what a command does with right ones is imported after that.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console, RenderableType
from yaml import YAMLError

from lightsparse.config.targets import ConfigError, did_you_mean
from lightsparse.config.typed import typed
from lightsparse.utils.refusal import Refusal

T = TypeVar("T")


def console(stderr: bool = False) -> Console:
    """Lines as they are: nothing in them is markup, and none is broken to fit."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False)


def command(work: Callable[[list[str]], Iterable[RenderableType]]) -> Callable[[Sequence[str] | None], int]:
    """The `main` of a command whose work takes the words and gives what to print, a line or a table at a time.

    It returns the exit code: 0, or 2 after the one sentence of a Refusal on stderr, or 130 after Ctrl-C.
    """

    @functools.wraps(work)
    def main(arguments: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if {"-h", "--help"} & set(words):
            console().print(sys.modules[work.__module__].__doc__)
            return 0
        try:
            for said in work(words):
                console().print(said)
        except Refusal as refusal:
            console(stderr=True).print(str(refusal))
            return 2
        except KeyboardInterrupt:
            return 130
        return 0

    return main


def options(cls: type[T], words: Sequence[str]) -> T:
    """The dataclass `cls` from `key=value` words, of two for one key the last. Raises ConfigError.

    A text is whatever stands behind the `=`. Everything else is read as YAML; a list of one needs no brackets.
    """
    kinds, given = typing.get_type_hints(cls), dict[str, Any]()
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ConfigError(f"{word} is not key=value; {_usage(cls)}")
        if key not in kinds:
            near = did_you_mean(key, list(kinds)) or f"; there are {', '.join(kinds)}"
            raise ConfigError(f"{key} is not a key{near}")
        given[key] = _read(kinds[key], value, word)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{field.name} is missing; {_usage(cls)}")
    return typed(cls, given, "")


def options_beside_overrides(cls: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """The command's own options, and the words that are left: overrides of train.py."""
    kinds = typing.get_type_hints(cls)
    own = [word for word in words if "=" in word and word.partition("=")[0] in kinds]
    return options(cls, own), [word for word in words if word not in own]


def _read(kind: Any, value: str, word: str) -> Any:
    members = typing.get_args(kind) or (kind,)
    if str in members and typing.get_origin(kind) is not tuple:
        return value
    if typing.get_origin(kind) is tuple and not value.startswith("["):
        return [_read(members[0], value, word)]
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"""{word} cannot be read as YAML; write a list as 'key=["a", "b"]'""") from error
    return typing.cast(dict[str, Any], found)["value"]


def _usage(cls: type) -> str:
    """The first example in the docstring of the command's module."""
    lines = (sys.modules[cls.__module__].__doc__ or "").splitlines()
    return f"write {next(line.strip() for line in lines if line.strip().startswith('lightsparse '))}"
