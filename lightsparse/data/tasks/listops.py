"""ListOps of the Long Range Arena: a nested expression of MIN, MAX, MED and SUM modulo 10 over digits: its value?

Nangia & Bowman 2018, arXiv 1804.06028; Tay et al. 2021, arXiv 2011.04006: depth up to 10, up to 10 arguments, 500 to
2,000 tokens, 96,000 / 2,000 / 2,000 examples, ten classes. Parentheses are left out, as they say nothing more than the
brackets do. The median of an even number of digits is the mean of the middle two, rounded down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.symbols import SymbolTokenizer
from lightsparse.data.tasks.task import Example, TaskConfig, no_labels

_OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
NAMES = (*map(str, range(10)), *_OPERATORS, "]", "=", "_")  # an id each: the value stands after "=", then only "_"
_OPEN, _CLOSE, _ASK, _PAD = 10, 14, 15, 16
_NESTED = 0.25  # chance of an argument to be an expression


class _TooLongError(Exception):
    """An expression that has outgrown its limit: drawn anew."""


@dataclass(frozen=True, kw_only=True)
class ListOps(TaskConfig):
    """An expression, "=" and padding, data.context tokens; asked is the label of "="."""

    context: int = 2048
    batch_size: int = 8
    examples: int = 96_000
    min_length: int = 500  # tokens of an expression, more than
    max_length: int = 2000  # tokens of an expression, fewer than
    max_depth: int = 10  # of nested expressions
    max_arguments: int = 10  # of an operator; at least 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 3 <= self.min_length + 1 < self.max_length:
            raise ValueError(
                f"data.min_length is {self.min_length} and data.max_length {self.max_length}; "
                "lengths lie between them, so that needs 2 ≤ min_length < max_length − 1"
            )
        if self.context < self.max_length:
            raise ValueError(
                f"data.context is {self.context} and data.max_length {self.max_length}; an expression and its = must "
                "fit: raise data.context"
            )
        if self.max_depth < 1 or self.max_arguments < 2:
            raise ValueError(
                f"data.max_depth is {self.max_depth} and data.max_arguments {self.max_arguments}; "
                "they must be at least 1 and 2"
            )
        longest = 1
        for _ in range(self.max_depth):
            longest = 2 + self.max_arguments * longest
        if self.min_length >= longest:
            raise ValueError(
                f"data.min_length is {self.min_length}, and with data.max_depth {self.max_depth} and "
                f"data.max_arguments {self.max_arguments} no expression has more than {longest} tokens; raise them"
            )
        if self.loss != "answer":
            raise ValueError("data.loss is all, but an expression cannot be predicted; use data.loss=answer")

    @property
    def vocab_size(self) -> int:
        return len(NAMES)

    def build_tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(len(NAMES), NAMES)

    def example(self, draws: Draws) -> Example:
        tokens = np.full(self.context, _PAD, dtype=np.int64)
        labels, evidence = no_labels(self.context)
        stream = _Stream(draws)
        while True:
            written: list[int] = []
            try:
                value = self._expression(stream, written, 1)
            except _TooLongError:
                continue
            if self.min_length < len(written):
                break
        tokens[: len(written)], tokens[len(written)] = written, _ASK
        labels[len(written)], evidence[len(written)] = value, len(written)
        return Example(tokens, labels, evidence)

    def _expression(self, stream: _Stream, written: list[int], depth: int) -> int:
        """Write an expression that starts at `depth`; returns its value."""
        operator = stream.below(len(_OPERATORS))
        written.append(_OPEN + operator)
        values = []
        for _ in range(2 + stream.below(self.max_arguments - 1)):
            if depth < self.max_depth and stream.chance() < _NESTED:
                values.append(self._expression(stream, written, depth + 1))
            else:
                values.append(stream.below(10))
                written.append(values[-1])
            if len(written) + depth >= self.max_length:  # with the brackets that are open
                raise _TooLongError
        written.append(_CLOSE)
        return list(_OPERATORS.values())[operator](values)


class _Stream:
    """Draws one by one, fetched by the thousand."""

    def __init__(self, draws: Draws):
        self._draws = draws
        self._values: Iterator[float] = iter(())

    def chance(self) -> float:
        for value in self._values:
            return value
        self._values = iter(self._draws.uniform(1024).tolist())
        return next(self._values)

    def below(self, limit: int) -> int:
        return int(self.chance() * limit)
