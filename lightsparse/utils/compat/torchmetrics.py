"""torchmetrics (1) and lightning_utilities: undocumented names that we touch."""

from __future__ import annotations

import sys

from lightning_utilities.core import imports

LEFT_OUT = ("transformers", "scipy", "matplotlib")


def import_torchmetrics() -> None:
    """Import torchmetrics, of which Lightning wants one class, without LEFT_OUT.

    It imports them wherever they are installed, for metrics of texts and sounds and for plots: a third of what a run
    would import before its first step. No setting leaves them out, but it asks lightning_utilities what is installed.
    Whoever wants those metrics imports torchmetrics first, or the metric from its own module.
    """
    if "torchmetrics" in sys.modules:
        return
    is_installed, is_met = imports.package_available, imports.RequirementCache.__bool__

    def is_wanted(cache: imports.RequirementCache) -> bool:
        return not (cache.requirement or "").startswith(LEFT_OUT) and is_met(cache)

    try:
        imports.package_available = lambda name: name not in LEFT_OUT and is_installed(name)  # type: ignore[assignment]
        imports.RequirementCache.__bool__ = is_wanted  # type: ignore[assignment, method-assign]
        import torchmetrics  # noqa: F401
    finally:
        imports.package_available = is_installed
        imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign]
