"""Every attention variant by its name, for Python: `lightsparse.attention` and `lightsparse.variants`."""

from __future__ import annotations

import dataclasses
import pkgutil
from importlib import import_module
from typing import Any

import lightsparse.attention as package
from lightsparse.attention.core import AttentionCore, AttentionShape
from lightsparse.config.build import AttentionChoice
from lightsparse.config.targets import ConfigError, did_you_mean
from lightsparse.config.typed import typed

_SHARED = ("core", "fixed", "sharded_call")  # what stands beside the variants in attention/


def build_attention(
    name: str,
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    embed_dim: int | None = None,
    causal: bool = True,
    context: int | None = None,
    **fields: Any,
) -> AttentionCore:
    """An attention variant as a module; q is [B, heads, N, head_dim], k and v are [B, kv_heads, N, head_dim].

        attn = lightsparse.attention("moba", heads=8, head_dim=64, block=128, top_k=4)
        out = attn(q, k, v, documents=documents)

    name       moba, nsa, block_sparse, …: a file of lightsparse/attention/, a value of `attention=` on the command line
    kv_heads   divides heads; None = heads
    embed_dim  width of x, the layer's input, which nsa, dsa, csa and hca read; None = heads · head_dim
    causal     False: tokens read both ways, where the variant can
    context    tokens that `density`, and the k_max of adaptive, refer to; None = only where neither needs it
    fields     the variant's own; `lightsparse.variants()` lists them with their defaults. Patterns are objects, such as
               LocalWindow(256), or what a YAML has for them

    What a call takes and returns: AttentionCore.forward. The module is what the transformer has in its layers:
    Transformer(config, lambda shape: attn), or build anew for every shape.
    Raises ConfigError, a ValueError, for an unknown name or keyword, with the nearest right one, for values that do not
    fit, and for what the variant cannot do.
    """
    core = _core_class(name)
    known = [field.name for field in dataclasses.fields(core.Config)]
    shape = {"heads": heads, "head_dim": head_dim, "causal": causal, "context": context}
    shape |= {"kv_heads": heads if kv_heads is None else kv_heads}
    for key in fields:
        if key not in known:
            nearest = did_you_mean(key, [*known, *shape, "embed_dim"]) or f"; it has {', '.join(known)}"
            raise ConfigError(f"attention {name} has no keyword {key}{nearest}")
    config = typed(core.Config, {key: _as_yaml(value) for key, value in fields.items()}, "attention")
    if embed_dim is None and isinstance(heads, int) and isinstance(head_dim, int):
        embed_dim = heads * head_dim
    return AttentionChoice(core, config).build(typed(AttentionShape, shape | {"embed_dim": embed_dim}, "attention"))


def variants() -> dict[str, dict[str, Any]]:
    """The names that `lightsparse.attention` takes, each with the variant's own keywords and their defaults."""
    return {name: _defaults(_core_class(name)) for name in _names()}


def _as_yaml(value: Any) -> Any:
    """With lists for tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _as_yaml(entry) for key, entry in value.items()}
    return [_as_yaml(entry) for entry in value] if isinstance(value, tuple | list) else value


def _defaults(core: type[AttentionCore]) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(core.Config)
    }


def _names() -> list[str]:
    modules = (module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return sorted(set(modules) - set(_SHARED))


def _core_class(name: str) -> type[AttentionCore]:
    """The class with a `Config` of its own in the variant's module."""
    if name not in _names():
        raise ConfigError(
            f"attention is {name!r}; it must be one of {', '.join(_names())}{did_you_mean(str(name), _names())}"
        )
    module = import_module(f"{package.__name__}.{name}")
    classes = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, AttentionCore))
    (core,) = (each for each in classes if each.__module__ == module.__name__ and "Config" in vars(each))
    return core
