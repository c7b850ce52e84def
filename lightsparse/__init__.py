"""lightsparse: train long-context transformers with exact sparse attention.

    attn = lightsparse.attention("moba", heads=8, head_dim=64, block=128, top_k=4)  # any variant, an ordinary module
    out = attn(q, k, v)

The names here are imported when they are first used. `__init__.pyi` has them for type checkers.
"""

import os
from importlib import import_module

__version__ = "0.2.0"

# Threads that spin while they wait for each other stand still as soon as anybody else uses a core, and the compiled
# attention kernel has threads of its own: the default model on two cores, one of them busy, took 15 s a step. Threads
# that sleep at once need 2.2 s on idle cores, where spinning needs 1.1 s; a short spin has both. GNU's OpenMP reads
# this when torch loads, so it counts where lightsparse is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_NAMES = {  # module: what it has
    "attention.adaptive": "BlockSparseAdaptive",
    "attention.block_sparse": "BlockSparseRingDilatedAttention",
    "attention.core": "AttentionShape SequenceContext",
    "attention.dense": "DenseAttention",
    "attention.dilated": "DilatedAttention",
    "attention.hierarchical": "BlockSparseHierarchical",
    "attention.modules.distributed": "BlockSparseRingDistributedDilatedAttention",
    "attention.modules.multihead": "BlockSparseRingMultiheadDilatedAttention",
    "config.variants": "variants",
    "kernels": "block_sparse_attention",
    "patterns": "AtDensity BigBird BlockDilated BlockGrid BlockLayout CacheStats ElementMask GlobalTokens Hierarchical"
    " Intersection LayoutKey LocalWindow Pattern PerHead PersistentPatternCache PooledHierarchy RandomBlocks Strided"
    " Union interval_mask",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(["attention", *_MODULE_OF])


def __getattr__(name: str) -> object:
    if name == "attention":  # a package that can be called
        return import_module("lightsparse.attention")
    if name not in _MODULE_OF:
        raise AttributeError(f"module lightsparse has no attribute {name}")
    globals()[name] = found = getattr(import_module(f"lightsparse.{_MODULE_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
