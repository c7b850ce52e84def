"""What a config chooses by `_target_` beside our own dataclasses: an attention, and classes of other packages.

    AttentionChoice  an AttentionCore subclass and its checked Config
    ClassChoice      an optimizer, a logger, a callback: a class and its arguments, checked against its signature

Every `_target_`, nested ones included, goes through `targets.resolve`. Nothing here starts any compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionShape
from lightsparse.config.targets import ConfigError
from lightsparse.config.typed import as_config_error, check_key, is_plain, target_of, typed, value_of


@dataclass(frozen=True)
class AttentionChoice:
    """Which attention, and its checked config: what `attention=<name>` gives."""

    core: type[AttentionCore]
    config: AttentionConfig

    @classmethod
    def of(cls, node: object, allow: Sequence[str] = ()) -> AttentionChoice:
        core, fields = target_of(node, "attention", AttentionCore, allow)
        return cls(core, typed(core.Config, fields, "attention", allow))

    @property
    def name(self) -> str:
        """The variant's file name, `block_sparse`."""
        return self.core.__module__.rsplit(".", 1)[-1]

    def build(self, shape: AttentionShape) -> AttentionCore:
        """The module of one layer. Raises ConfigError when the variant cannot take this shape."""
        try:
            return self.core(self.config, shape)
        except ValueError as error:
            raise as_config_error(error, "attention") from error


@dataclass(frozen=True)
class ClassChoice:
    """Which class of another package, and what it will be called with."""

    target: type
    arguments: Mapping[str, Any]  # plain values; a nested group with a `_target_` is a ClassChoice as well
    path: str  # its place in the config, for errors

    @classmethod
    def of(cls, node: object, path: str, kind: type, allow: Sequence[str] = ()) -> ClassChoice:
        """The choice that a node with a `_target_` describes; nothing is built.

        kind  what it must be a subclass of: Optimizer, Logger, Callback …
        Raises ConfigError for a refused target, an unknown argument, and a plain value of the wrong type.
        """
        target: type
        target, given = target_of(node, path, kind, allow)
        try:
            parameters = inspect.signature(target, eval_str=True).parameters
        except NameError:  # annotations imported for type checkers only: the class has to check values by itself
            parameters = inspect.signature(target).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        arguments = {}
        for key, value in given.items():
            if key.startswith("_") or not takes_any:
                check_key(key, parameters, path)
            arguments[key] = _argument(value, f"{path}.{key}", allow)
            if key in parameters and is_plain(parameters[key].annotation):
                value_of(parameters[key].annotation, value, f"{path}.{key}")  # looked at only: it gets YAML's own
        return cls(target, arguments, path)

    def build(self, *given: Any, **named: Any) -> Any:
        """The object, with the run's own arguments in place of the config's. Raises ConfigError with its complaint."""
        arguments = {key: _built(value) for key, value in self.arguments.items()} | named
        try:
            return self.target(*given, **arguments)
        except Exception as error:
            if not _is_complaint(error):
                raise
            raise as_config_error(error, self.path) from error


def _is_complaint(error: Exception) -> bool:
    """Whether a constructor says of its arguments that they are wrong."""
    if isinstance(error, ValueError | TypeError | ImportError):
        return True
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # takes seconds to import

    return isinstance(error, MisconfigurationException)


def _argument(value: object, path: str, allow: Sequence[str]) -> Any:
    """A value for a class of another package. Refused: targets outside the guard, a second round of interpolation."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path} is {value!r}; an interpolation may not give another interpolation")
    if isinstance(value, list):
        return [_argument(entry, f"{path}[{i}]", allow) for i, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value_of(Any, value, path)
    if "_target_" in value:
        return ClassChoice.of(value, path, object, allow)
    for key in value:
        if str(key).startswith("_"):
            raise ConfigError(f"{path}.{key} is not a key; only _target_ may start with an underscore")
    return {key: _argument(entry, f"{path}.{key}", allow) for key, entry in value.items()}


def _built(value: Any) -> Any:
    if isinstance(value, ClassChoice):
        return value.build()
    if isinstance(value, list):
        return [_built(entry) for entry in value]
    return {key: _built(entry) for key, entry in value.items()} if isinstance(value, dict) else value
