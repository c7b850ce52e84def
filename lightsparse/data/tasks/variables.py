"""RULER's variable tracking: chains of assignments hidden in a text: which variables hold the value?

Hsieh et al. 2024, arXiv 2404.06654, section 3.2: one chain of four hops, five names.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.text_task import Needle, Problem, TextTask
from lightsparse.data.tasks.words import variable_names

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True, kw_only=True)
class VariableTracking(TextTask):
    """`chains` chains of `hops` + 1 variables, one of them asked for; data.depth is that of its first assignment."""

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chains < 1 or self.hops < 0:
            raise ValueError(f"data.chains is {self.chains} and data.hops {self.hops}; at least 1 and 0")

    def problem(self, draws: Draws) -> Problem:
        first_depth = self.drawn_depth(draws)
        length = self.hops + 1
        names = variable_names(draws, self.chains * length)
        values = [str(value) for value in (10_000 + draws.distinct(90_000, self.chains)).tolist()]
        needles = []
        for chain, value in enumerate(values):
            own = names[chain * length : (chain + 1) * length]
            start = first_depth if chain == 0 else draws.chance()
            later = sorted(draws.uniform(self.hops).tolist())  # assignments follow each other
            depths = [start, *(start + (1 - start) * share for share in later)]
            for i, (name, depth) in enumerate(zip(own, depths, strict=True)):
                source = value if i == 0 else f"VAR {own[i - 1]}"
                needles.append(Needle(f"VAR {name} = {source}.\n", depth, chain == 0))
        return Problem(
            head="Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
            filler=repeat(_FILLER),
            needles=needles,
            question=f"Question: Find all variables that are assigned the value {values[0]} in the text above. Answer: "
            f"According to the chain(s) of variable assignment in the text above, {length} variables are assigned the "
            f"value {values[0]}, they are:",
            references=tuple(names[:length]),
        )
