"""What a model plugs in: one module per variant, one file each.

Called, this package makes a variant by its name; help(lightsparse.config.variants.build_attention) says what it takes:

    attn = lightsparse.attention("moba", heads=8, head_dim=64, block=128, top_k=4)
    out = attn(q, k, v)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext

__all__ = ["AttentionConfig", "AttentionCore", "AttentionResult", "AttentionShape", "SequenceContext"]


class _Callable(ModuleType):
    def __call__(self, name: str, **keywords: Any) -> AttentionCore:
        """See lightsparse.config.variants.build_attention."""
        return import_module("lightsparse.config.variants").build_attention(name, **keywords)


# `lightsparse.attention` is this package and, as a name of `lightsparse`, a function. Importing anything in here makes
# it the package, whatever the name meant before; so the package itself can be called. What builds lies a floor above.
sys.modules[__name__].__class__ = _Callable
