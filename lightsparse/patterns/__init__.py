"""Which blocks are attended: pure functions from sizes to a BlockLayout."""

from lightsparse.patterns.at_density import AtDensity
from lightsparse.patterns.block_dilated import BlockDilated
from lightsparse.patterns.global_tokens import GlobalTokens
from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.local_window import LocalWindow
from lightsparse.patterns.mask import ElementMask, interval_mask
from lightsparse.patterns.pattern import Intersection, Pattern, Union
from lightsparse.patterns.strided import Strided

__all__ = [
    "AtDensity",
    "BlockDilated",
    "BlockGrid",
    "BlockLayout",
    "ElementMask",
    "GlobalTokens",
    "Intersection",
    "LocalWindow",
    "Pattern",
    "Strided",
    "Union",
    "interval_mask",
]
