"""The patterns that are timed, solved for a density."""

from __future__ import annotations

from lightsparse.patterns import AtDensity, BlockLayout, GlobalTokens, LocalWindow, Pattern, Strided
from lightsparse.patterns.at_density import OutOfReach

KINDS = ("window", "mixed")
_STEP = 0.005  # AtDensity's answer is within 2% of its target; the target is moved by this much to the wanted side


def pattern_at(kind: str, density: float, seq: int, block: int, *, at_most: bool = False) -> Pattern:
    """A causal pattern of `seq` tokens whose achieved density is at least (or `at_most`: at most) the nominal one.

    kind   window = LocalWindow; mixed = LocalWindow | GlobalTokens(4) | Strided, a third of the density in the strides
    Where even the sparsest pattern of that kind is denser than asked, that one is returned.
    Raises ValueError for another kind or a density outside (0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"pattern is {kind!r}; choose one of {', '.join(KINDS)}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}; it is a share of dense tiles and must lie in (0, 1]")
    sparsest: Pattern = LocalWindow(1)
    if kind == "mixed":
        sparsest = sparsest | GlobalTokens(4) | Strided(max(2, round(3 / density)))
    if _layout(sparsest, seq, block).density() >= density:
        return sparsest
    target = density
    while 0.5 * density < target <= 1.0:
        pattern = AtDensity(sparsest, target, at=seq)
        try:
            achieved = _layout(pattern, seq, block).density()
        except OutOfReach:  # a grid of few blocks reaches few densities: on to the next target
            achieved = None
        if achieved is not None and (achieved <= density if at_most else achieved >= density):
            return pattern
        target *= 1 - _STEP if at_most else 1 + _STEP
    return sparsest if at_most else LocalWindow(seq)


def _layout(pattern: Pattern, seq: int, block: int) -> BlockLayout:
    return pattern.layout(seq, block=block)
