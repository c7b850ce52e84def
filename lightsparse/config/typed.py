"""From YAML's plain values to typed ones: the one place that knows what an annotation lets a user write.

    typed(cls, node, path)            a frozen dataclass of ours
    chosen(base, node, path)          the same for the subclass of `base` that the node's `_target_` names
    value_of(annotation, node, path)  one value

Strict: no text for a number, neither true nor nan is one; an integer is, and a list is a tuple. Not left to pydantic:
its strict mode takes no mapping for a dataclass and no list for a tuple, its errors know neither `_target_` nor what
else a field would take, and its import alone costs a refused command 0.2 s. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from lightsparse.config.targets import ConfigError, did_you_mean, resolve

T = TypeVar("T")
PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}  # YAML's values
MISSING = "???"  # Hydra's mark for a value the user must give


def chosen(base: type[T], node: object, path: str, allow: Sequence[str] = ()) -> T:
    """The dataclass that a node's `_target_` names, a subclass of `base`; see `typed`."""
    cls, fields = target_of(node, path, base, allow)
    return typed(cls, fields, path, allow)


def typed(cls: type[T], node: object, path: str, allow: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a mapping; keys, types and the class's own rules are checked.

    path   the dotted place of the node in the config ("" = the whole), for errors
    allow  classes that a `_target_` inside may name besides ours; see `targets.resolve`
    Raises ConfigError for an unknown or missing key, a value of another type, and with the very sentence of a
    ValueError of `__post_init__`.
    """
    where = path or "the config"
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} is {_shown(node)}; it must be {_described(cls)}")
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{where} names {cls.__name__}, which has no typed fields and cannot stand here")
    fields, hints = keys_of(cls), typing.get_type_hints(cls)
    values = {}
    for key, value in node.items():
        check_key(key, fields, path)
        values[key] = value_of(hints[key], value, dotted(path, key), allow)
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name} is missing" if path else f"{name} is missing from the config")
    try:
        return typing.cast(T, cls(**values))
    except ValueError as error:
        raise as_config_error(error, path) from error


def value_of(annotation: Any, node: object, path: str, allow: Sequence[str] = ()) -> Any:
    """The node as the annotation has it: lists become tuples, groups of keys dataclasses. Raises ConfigError."""
    if node == MISSING:
        raise ConfigError(f"{path} has no value yet; give it one: {path}=…")
    members = _members(annotation)
    if any(_is_one(member, node) for member in members):
        return node
    if float in members and type(node) is int:
        return float(node)
    for member in members:
        items = typing.get_args(member)
        if isinstance(node, list) and typing.get_origin(member) is tuple:
            items = items[:1] * len(node) if items[1:] == (...,) else items
            if len(items) == len(node):
                return tuple(value_of(items[i], entry, f"{path}[{i}]", allow) for i, entry in enumerate(node))
        if isinstance(node, Mapping) and typing.get_origin(member) is dict:
            return {str(key): value_of(items[1], entry, dotted(path, key), allow) for key, entry in node.items()}
        if isinstance(node, Mapping) and _is_class(member) and ("_target_" in node or dataclasses.is_dataclass(member)):
            return (chosen if "_target_" in node else typed)(member, node, path, allow)
    raise ConfigError(f"{path} is {_shown(node)}; it must be {_described(annotation)}")


def target_of(node: object, path: str, base: type[T], allow: Sequence[str]) -> tuple[type[T], dict[str, Any]]:
    """The class named by a node's `_target_`, which must be a proper subclass of `base`, and the node's other keys."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{path} is {_shown(node)}; it must be a group of keys with a _target_")
    target = resolve(node["_target_"], path, allow)
    if not issubclass(target, base) or target is base:
        raise ConfigError(f"{path}._target_ is {node['_target_']}; it must be a subclass of {base.__name__}")
    return target, {str(key): value for key, value in node.items() if key != "_target_"}


def check_key(key: object, known: Iterable[str], path: str) -> None:
    """Raises ConfigError where `key` is none of the known ones of the group at `path`."""
    names, prefix = list(known), dotted(path, "")
    if key not in names:
        near = did_you_mean(str(key), names, prefix)
        raise ConfigError(
            f"{prefix}{key} is not a key" + (near or f"; {path or 'the config'} has {', '.join(names) or 'none'}")
        )


def as_config_error(error: Exception, path: str) -> ConfigError:
    """The error's own sentence; its place in front when the sentence does not begin with it."""
    sentence = str(error)
    return ConfigError(sentence if sentence.startswith(path.split(".")[0]) else f"{path}: {sentence}")


def keys_of(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass that are keys of the config, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata.get("key", True)}


def dotted(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def is_plain(annotation: Any) -> bool:
    """Whether an annotation is made of YAML's plain types alone, and so tells all that a user may write."""
    parts = _members(annotation)
    if typing.get_origin(annotation) is tuple:
        parts = tuple(part for part in typing.get_args(annotation) if part is not ...)
    if parts != (annotation,):
        return all(map(is_plain, parts))
    return annotation in PLAIN or typing.get_origin(annotation) is Literal or _is_tensor(annotation)


def _is_one(member: Any, node: object) -> bool:
    """Whether the node is a value of one member of a union as it stands."""
    if typing.get_origin(member) is Literal:
        return any(type(node) is type(choice) and node == choice for choice in typing.get_args(member))
    if member in PLAIN:
        return type(node) is member and (member is not float or math.isfinite(typing.cast(float, node)))
    return member is Any or (_is_class(member) and isinstance(node, member))


def _is_class(member: Any) -> bool:
    """Whether a member is a class of its own, none of YAML's."""
    return isinstance(member, type) and typing.get_origin(member) is None and member not in PLAIN


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _shown(value: object) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def _described(annotation: Any) -> str:
    """What a user may write for this annotation, in words."""
    members = [member for member in _members(annotation) if not _is_tensor(member)]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if members != [annotation]:
        return " or ".join(map(_described, members))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"a list{'' if ... in arguments else f' of {len(arguments)}'}, each {_described(arguments[0])}"
    if origin is dict:
        return "a group of keys"
    if dataclasses.is_dataclass(annotation):
        return f"a group of keys: {', '.join(keys_of(annotation))}"
    return PLAIN.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _is_tensor(member: Any) -> bool:
    """Whether it is torch.Tensor, which signatures name beside numbers and nobody can write in YAML."""
    return getattr(member, "__module__", None) == "torch" and member.__name__ == "Tensor"
