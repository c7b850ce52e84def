"""Which blocks are attended: pure functions from sizes to a BlockLayout."""

from lightsparse.patterns.at_density import AtDensity
from lightsparse.patterns.big_bird import BigBird
from lightsparse.patterns.block_dilated import BlockDilated
from lightsparse.patterns.cache import CacheStats, LayoutKey, PersistentPatternCache
from lightsparse.patterns.global_tokens import GlobalTokens
from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.hierarchical import Hierarchical, PooledHierarchy
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.local_window import LocalWindow
from lightsparse.patterns.mask import ElementMask, interval_mask
from lightsparse.patterns.pattern import Intersection, Pattern, Union
from lightsparse.patterns.per_head import PerHead
from lightsparse.patterns.random_blocks import RandomBlocks
from lightsparse.patterns.strided import Strided

__all__ = [
    "AtDensity",
    "BigBird",
    "BlockDilated",
    "BlockGrid",
    "BlockLayout",
    "CacheStats",
    "ElementMask",
    "GlobalTokens",
    "Hierarchical",
    "Intersection",
    "LayoutKey",
    "LocalWindow",
    "Pattern",
    "PerHead",
    "PersistentPatternCache",
    "PooledHierarchy",
    "RandomBlocks",
    "Strided",
    "Union",
    "interval_mask",
]
