"""How attention over a BlockLayout is computed: one entry, several backends."""

from lightsparse.kernels.dispatch import (
    BACKENDS,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    set_backend,
    use_backend,
)
from lightsparse.kernels.dropout import Dropout, sample_keys

__all__ = [
    "BACKENDS",
    "Dropout",
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "sample_keys",
    "set_backend",
    "use_backend",
]
