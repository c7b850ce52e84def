"""Which classes a config may name: every `_target_` passes through `resolve` before anything is built.

A prefix of the dotted name is not enough: `lightning.pytorch.loggers.wandb.os.system` has a harmless one. So the name
is refused before any import unless it lies in an allowed package, then imported as a module path (never through
attributes of a module), and what is found must be a class whose own `__module__` lies in an allowed package.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from difflib import get_close_matches

from lightsparse.utils.refusal import Refusal

PACKAGES = (
    "lightsparse",
    "torch.optim",
    "torch.nn",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)


class ConfigError(Refusal):
    """A wrong config in one sentence: the field, its value, what is allowed, the way out."""


def resolve(target: object, path: str, allow: Sequence[str] = ()) -> type:
    """The class that a `_target_` names.

    target  dotted name of a class, as it stands in the config
    path    where it stands (`logger.wandb`), for the error
    allow   the user's `allow_targets`: dotted names of classes, or of modules whose own classes are all trusted
    Raises ConfigError, before importing anything, for a name outside PACKAGES and `allow`; and for whatever is not a
    class defined in one of them.
    """
    where = f"{path}._target_ is {target}"
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ConfigError(f"{where}; it must be the dotted name of a class, without private parts")
    name = ".".join(parts)
    if not _lies_in(name, (*PACKAGES, *allow)):
        raise ConfigError(
            f"{where}; a config may name classes of {', '.join(PACKAGES)} only, others need an entry in allow_targets"
        )
    module_name, class_name = name.rsplit(".", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and _lies_in(module_name, (error.name,)):
            raise ConfigError(f"{where}; there is no module {error.name}") from error
        raise ConfigError(f"{where}; its module needs {error.name}, which is not installed") from error
    except ImportError as error:
        raise ConfigError(f"{where}; its module cannot be imported: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
        raise ConfigError(f"{where}; {module_name} has no {class_name}{did_you_mean(class_name, classes)}")
    if not isinstance(found, type):
        raise ConfigError(f"{where}; that is a {type(found).__name__}, and only classes may be named")
    if name not in allow and not _lies_in(found.__module__, (*PACKAGES, *allow)):
        raise ConfigError(
            f"{where}; that class comes from {found.__module__}, which is none of {', '.join(PACKAGES)}; "
            f"name it by its own module and add it to allow_targets"
        )
    return found


def did_you_mean(wrong: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` when some known name is close to the wrong one, else nothing."""
    close = get_close_matches(wrong, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _lies_in(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
