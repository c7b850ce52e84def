"""Every variant × every property of battery.py. `pytest tests/test_battery.py -q` ends with the table of both.

A pair is left out only where the core declares the capability missing; the table then shows its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import battery
import pytest
from battery import SHAPES, Shape, Variant, variants


class Property(NamedTuple):
    check: Callable[..., None]
    needs: str | None = None  # class attribute of the core that must be True
    shapes: tuple[Shape, ...] = ()  # run once per shape


# No groups of queries, groups of 2 and ten windows of the small variants, groups of 8.
DECODED = (Shape(90, 1, 2, 2, 32), Shape(230, 2, 4, 2, 32), Shape(90, 1, 8, 1, 32))

PROPERTIES = (
    Property(battery.equals_the_reference, shapes=SHAPES),
    Property(battery.passes_gradcheck),
    Property(battery.rounds_like_dense_in_bf16),
    Property(battery.averages_values, "exact_at_full_budget", SHAPES[:3]),
    Property(battery.never_sees_the_future, "supports_causal"),
    Property(battery.never_sees_the_future_while_training, "supports_causal"),
    Property(battery.keeps_documents_apart),
    Property(battery.packs_like_separate_documents),
    Property(battery.is_dense_at_full_budget, "exact_at_full_budget", SHAPES[:3]),
    Property(battery.decodes_token_by_token, "supports_causal"),
    Property(battery.decodes_from_a_cache, "supports_causal", DECODED),
    Property(battery.generates_like_the_full_forward, "supports_causal"),
    Property(battery.batches_prompts_of_any_lengths, "supports_causal"),
    Property(battery.chooses_again_what_it_chose),
    Property(battery.trains_the_same_recomputed_layer_by_layer),
    Property(battery.compiles),
    Property(battery.takes_a_batch_of_none),
    Property(battery.grows_linearly),
    Property(battery.reports_its_density),
    Property(battery.density_is_a_target_or_refused),
    Property(battery.refuses_what_it_declares_it_cannot),
)


def cases():
    for variant in variants():
        for property in PROPERTIES:
            if property.needs is None or getattr(variant.core_class, property.needs):
                for shape in property.shapes or (None,):
                    name = f"{variant.name}-{property.check.__name__}" + (f"-{shape}" if shape else "")
                    yield pytest.param(variant, property, shape, id=name)


@pytest.mark.parametrize(("variant", "property", "shape"), list(cases()))
def test_battery(variant: Variant, property: Property, shape: Shape | None, battery_result) -> None:
    battery_result(variant.name, property.check.__name__)
    property.check(variant, *((shape,) if shape else ()))


def test_every_yaml_names_a_module_of_its_own_name_and_every_core_has_a_yaml() -> None:
    import importlib
    import inspect
    import pkgutil

    import lightsparse.attention as package
    from lightsparse.attention.core import AttentionCore

    defining = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"lightsparse.attention.{info.name}")
        cores = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        if any(issubclass(c, AttentionCore) and "Config" in vars(c) for c in cores):
            defining.add(info.name)
    assert {variant.name for variant in variants()} == defining
    assert all(variant.choice.name == variant.name for variant in variants())
