"""From nodes of the config to checked objects: dataclasses by `typed`, classes of other packages by `build`.

    typed(cls, node, path)   a frozen dataclass of ours: unknown keys are errors, leaf types are strict
    chosen(base, node, path) the same for the subclass of `base` that the node's `_target_` names
    build(node, path, ...)   a logger or callback: names and types against the signature, then Hydra builds it
    AttentionChoice          an AttentionCore subclass and its checked Config
    OptimizerChoice          a torch Optimizer and its checked arguments

Every `_target_`, nested ones included, goes through `targets.resolve`. Nothing here starts any compute.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import hydra.utils
from hydra.errors import InstantiationException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionShape
from lightsparse.config.targets import ConfigError, did_you_mean, resolve

T = TypeVar("T")
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}  # YAML's values
MISSING = "???"  # Hydra's mark for a value the user must give


@dataclass(frozen=True)
class AttentionChoice:
    """Which attention, and its checked config: what `attention=<name>` gives."""

    core: type[AttentionCore]
    config: AttentionConfig

    @classmethod
    def of(cls, node: object, allow: Sequence[str] = ()) -> AttentionChoice:
        core, fields = _target_of(node, "attention", AttentionCore, allow)
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
            raise _as_config_error(error, "attention") from error


@dataclass(frozen=True)
class OptimizerChoice:
    """Which optimizer and its keyword arguments, checked against its signature."""

    target: type[Optimizer]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, node: object, allow: Sequence[str] = ()) -> OptimizerChoice:
        target, arguments = _target_of(node, "optimizer", Optimizer, allow)
        _check_arguments(target, arguments, "optimizer", allow)
        return cls(target, arguments)

    def build(self, groups: Iterable[Any]) -> Optimizer:
        """The optimizer over parameter groups. Raises ConfigError with its own complaint about a value."""
        return _instantiate(self.target, self.kwargs, "optimizer", groups)


def build(node: object, path: str, *, kind: type, allow: Sequence[str] = (), **given: Any) -> Any:
    """The object a `_target_` node describes, with the run's own arguments (`given`) in place of the node's.

    kind   what it must be an instance of: Logger, Callback …
    Raises ConfigError for a refused target, an unknown argument, a wrong type, or what the constructor complains about.
    """
    target: type
    target, arguments = _target_of(node, path, kind, allow)
    _check_arguments(target, arguments, path, allow)
    return _instantiate(target, arguments | given, path)


def check_buildable(node: object, path: str, *, kind: type, allow: Sequence[str] = ()) -> type:
    """The class that `build` would call, all checks done, nothing built."""
    target: type
    target, arguments = _target_of(node, path, kind, allow)
    _check_arguments(target, arguments, path, allow)
    return target


def chosen(base: type[T], node: object, path: str, allow: Sequence[str] = ()) -> T:
    """The dataclass that a node's `_target_` names, a subclass of `base`; see `typed`."""
    cls, fields = _target_of(node, path, base, allow)
    return typed(cls, fields, path, allow)


def typed(cls: type[T], node: object, path: str, allow: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a mapping; keys, types and the class's own rules are checked.

    path  the dotted place of the node in the config ("" = the whole), for errors
    Raises ConfigError for an unknown or missing key, a value of another type, and with the very sentence of a
    ValueError of `__post_init__`. Lists become tuples; a nested mapping with `_target_` becomes that dataclass.
    """
    where = path or "the config"
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} is {_shown(node)}; it must be a group of keys: {_keys_of(cls)}")
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{where} names {cls.__name__}, which has no typed fields and cannot stand here")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in node.items():
        if key not in fields:
            raise ConfigError(_unknown_key(path, str(key), list(fields)))
        values[key] = _value(hints[key], value, f"{path}.{key}" if path else key, allow)
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not optional:
            raise ConfigError(f"{path}.{name} is missing" if path else f"{name} is missing from the config")
    try:
        return typing.cast(T, cls(**values))
    except ValueError as error:
        raise _as_config_error(error, path) from error


def _value(annotation: Any, value: object, path: str, allow: Sequence[str]) -> Any:
    """`value` as the annotation asks for it; see `typed`."""
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    classes = tuple(member for member in members if _is_class(member))
    if value == MISSING:
        raise ConfigError(f"{path} has no value yet; give it one: {path}=…")
    if annotation is Any or (classes and isinstance(value, classes)) or (value is None and type(None) in members):
        return value
    if isinstance(value, Mapping):
        if "_target_" in value:
            if not classes:
                raise ConfigError(f"{path} names a _target_; it must be {_described(annotation)}")
            return chosen(classes[0], value, path, allow)
        for member in members:
            if typing.get_origin(member) is dict:
                item = typing.get_args(member)[1]
                return {str(key): _value(item, entry, f"{path}.{key}", allow) for key, entry in value.items()}
    if isinstance(value, list):
        for member in members:
            if typing.get_origin(member) is tuple:
                items = typing.get_args(member)
                kinds = items[:1] * len(value) if items[1:] == (...,) else items
                if len(kinds) == len(value):
                    return tuple(_value(kinds[i], entry, f"{path}[{i}]", allow) for i, entry in enumerate(value))
    for record in filter(dataclasses.is_dataclass, classes):
        return typed(typing.cast(type, record), value, path, allow)
    return _leaf(annotation, value, path)


def _leaf(annotation: Any, value: object, path: str) -> Any:
    """A plain value, strictly of the annotation's type: no text for numbers, no bool for int; int for float is fine."""
    try:
        return TypeAdapter(annotation, config=STRICT).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{path} is {_shown(value)}; it must be {_described(annotation)}") from error


def _target_of(node: object, path: str, base: type[T], allow: Sequence[str]) -> tuple[type[T], dict[str, Any]]:
    """The class named by a node's `_target_`, which must be a proper subclass of `base`, and the node's other keys."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{path} is {_shown(node)}; it must be a group of keys with a _target_")
    target = resolve(node["_target_"], path, allow)
    if not issubclass(target, base) or target is base:
        raise ConfigError(f"{path}._target_ is {node['_target_']}; it must be a subclass of {base.__name__}")
    return target, {str(key): value for key, value in node.items() if key != "_target_"}


def _check_arguments(target: type, arguments: Mapping[str, Any], path: str, allow: Sequence[str]) -> None:
    """Refuse argument names and plain values that the signature of `target` does not take, and nested evil targets."""
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except NameError:  # annotations imported for type checkers only: the class has to check values by itself
        parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in arguments.items():
        if key.startswith("_") or (key not in parameters and not takes_any):
            raise ConfigError(_unknown_key(path, key, list(parameters)))
        _check_nested(value, f"{path}.{key}", allow)
        if key in parameters and _says_it_all(parameters[key].annotation):
            _value(parameters[key].annotation, value, f"{path}.{key}", ())


def _says_it_all(annotation: Any) -> bool:
    """Whether an annotation of another package tells which plain values are right: made of plain types alone."""
    if annotation is Tensor or annotation in PLAIN:
        return True
    if _is_union(annotation) or typing.get_origin(annotation) is tuple:
        return all(_says_it_all(part) for part in typing.get_args(annotation) if part is not ...)
    return typing.get_origin(annotation) is Literal


def _check_nested(value: object, path: str, allow: Sequence[str]) -> None:
    """Refuse what Hydra would act on inside a value: targets outside the guard, a second round of interpolation."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path} is {value!r}; an interpolation may not give another interpolation")
    if isinstance(value, Mapping):
        if "_target_" in value:
            _check_arguments(*_target_of(value, path, object, allow), path, allow)
        else:
            for key, entry in value.items():
                if str(key).startswith("_"):
                    raise ConfigError(f"{path}.{key} is not a key; only _target_ may start with an underscore")
                _check_nested(entry, f"{path}.{key}", allow)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            _check_nested(entry, f"{path}[{i}]", allow)


def _instantiate(target: type[T], kwargs: Mapping[str, Any], path: str, *args: Any) -> T:
    """Hydra's instantiate on a checked target. Tensors go by position: Hydra copies what goes by name."""
    node = {"_target_": f"{target.__module__}.{target.__qualname__}", **kwargs}
    try:
        return hydra.utils.instantiate(node, *args, _convert_="all")
    except InstantiationException as error:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        cause = error.__cause__
        if isinstance(cause, ValueError | TypeError | ImportError | MisconfigurationException):
            raise _as_config_error(cause, path) from error
        raise


def _as_config_error(error: Exception, path: str) -> ConfigError:
    """The error's own sentence; its place in front when the sentence does not begin with it."""
    sentence = str(error)
    return ConfigError(sentence if sentence.startswith(path.split(".")[0]) else f"{path}: {sentence}")


def _unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    prefix = f"{path}." if path else ""
    return f"{prefix}{key} is not a key" + (
        did_you_mean(key, known, prefix) or f"; {path or 'the config'} has {', '.join(known) or 'none'}"
    )


def _keys_of(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else cls.__name__


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_class(member: Any) -> bool:
    return isinstance(member, type) and typing.get_origin(member) is None and member not in PLAIN


def _shown(value: object) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def _described(annotation: Any) -> str:
    """What a user may write for this annotation, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return " or ".join(_described(member) for member in arguments if member is not Tensor)  # YAML has no tensors
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (tuple, list):
        length = "" if origin is list or ... in arguments else f" of {len(arguments)}"
        return f"a list{length}, each {_described(arguments[0])}"
    if origin is dict:
        return "a group of keys"
    return PLAIN.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")
