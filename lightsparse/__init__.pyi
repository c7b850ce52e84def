from lightsparse.attention.adaptive import BlockSparseAdaptive as BlockSparseAdaptive
from lightsparse.attention.block_sparse import BlockSparseRingDilatedAttention as BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape as AttentionShape
from lightsparse.attention.core import SequenceContext as SequenceContext
from lightsparse.attention.dense import DenseAttention as DenseAttention
from lightsparse.attention.dilated import DilatedAttention as DilatedAttention
from lightsparse.attention.hierarchical import BlockSparseHierarchical as BlockSparseHierarchical
from lightsparse.attention.modules.distributed import (
    BlockSparseRingDistributedDilatedAttention as BlockSparseRingDistributedDilatedAttention,
)
from lightsparse.attention.modules.multihead import (
    BlockSparseRingMultiheadDilatedAttention as BlockSparseRingMultiheadDilatedAttention,
)
from lightsparse.config.variants import build_attention
from lightsparse.config.variants import variants as variants
from lightsparse.kernels import block_sparse_attention as block_sparse_attention
from lightsparse.patterns import *  # noqa: F403

__version__: str
attention = build_attention  # at run time a package that can be called
