"""Which values an operation can take: the finite sets from which directions and neurons are made.

Sets may be larger than what really occurs (every pair of two sets, say), never smaller. Numbers are exact fractions.

Steps: look each operation up by its inputs' sets, apply the user's functions to every member, refuse what has no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tomoscope.errors import DataError
from tomoscope.phantoms.compiled.rasp import Aggregate, Constant, Indices, Map, SequenceMap, SOp, Tokens, Width

Number = int | Fraction
MAX_CATEGORIES = 512
MAX_NUMBERS = 4096
_LINEAR_SAMPLE = 24


def may_be_none(sop: SOp) -> bool:
    """Whether an operation might have no value somewhere: a copy of nothing, or a map of one."""
    if sop.numerical or isinstance(sop, Tokens | Indices | Constant | Width):
        return False
    return isinstance(sop, Aggregate) or any(may_be_none(source) for source in sop.inputs)


def number(value: Any, what: str = "A value") -> Number:
    """An exact number of a bool, int, float or Fraction. Raises DataError for anything else and for no finite one."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Fraction):
        return value
    try:
        return Fraction(value).limit_denominator(10**6)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{what} is {value!r}, which is no finite number.", remedy="Give numbers, or leave numerical=True out."
        ) from error


def applied(function: Callable[..., Any], *values: Any) -> Any:
    """What a user's function gives; what it raises becomes a DataError that says for which values."""
    try:
        return function(*values)
    except Exception as error:
        name = getattr(function, "__name__", "The function")
        raise DataError(
            f"{name}{values!r} raised {type(error).__name__}: {error}.",
            remedy="A program's functions are called with every value that could come, so each must give an answer.",
        ) from error


@dataclass
class Domains:
    """The sets of values of operations, over a vocabulary and lengths from 1 to `max_length`."""

    vocabulary: tuple[Hashable, ...]
    max_length: int
    _known: dict[SOp, tuple[Any, ...]] = field(default_factory=dict)

    def __call__(self, sop: SOp) -> tuple[Any, ...]:
        """Categories in the order they are met, numbers in ascending order; "no value" is not among them."""
        if sop not in self._known:
            values = tuple(self._values(sop))
            limit = MAX_NUMBERS if sop.numerical else MAX_CATEGORIES
            if len(values) > limit:
                raise self._unbounded(sop, f"{len(values)}", limit)
            self._known[sop] = values
        return self._known[sop]

    def _unbounded(self, sop: SOp, count: str, limit: int) -> DataError:
        kind = "numbers" if sop.numerical else "categories"
        return DataError(
            f"{sop.name or type(sop).__name__} can take {count} {kind}, and {limit} is the most that is compiled.",
            remedy="Bound it with .map(function), or give a smaller vocabulary or max_length.",
        )

    def _values(self, sop: SOp) -> Any:
        match sop:
            case Tokens():
                return self.vocabulary
            case Indices():
                return range(self.max_length)
            case Constant():
                return (sop.value,)
            case Width():
                return range(self.max_length + 1)
            case Map():
                return self._tidy(sop, [applied(sop.function, value) for value in self(sop.source)])
            case SequenceMap() if sop.first.numerical:
                return self._linear_values(sop)
            case SequenceMap():
                first, second = self(sop.first), self(sop.second)
                return self._tidy(sop, [applied(sop.function, one, other) for one in first for other in second])
            case Aggregate():
                return self._means(sop) if sop.numerical else self(sop.source)
        raise DataError(f"{sop!r} is no operation that can be compiled.", remedy="Use the operations of this package.")

    def _tidy(self, sop: SOp, values: list[Any]) -> list[Any]:
        if sop.numerical:
            none: set[Number] = {0} if any(may_be_none(source) for source in sop.inputs) else set()
            return sorted(none | {number(value, f"A value of {sop.name or 'a map'}") for value in values})
        for value in values:
            if value is None or not isinstance(value, Hashable):
                raise DataError(
                    f"{sop.name or 'A map'} gives {value!r}, which can't be a category.",
                    remedy="Give hashable values other than None.",
                )
        return list(dict.fromkeys(values))

    def _means(self, sop: Aggregate) -> list[Number]:
        """Means of up to max_length values, and 0 for those of none."""
        members = self(sop.source)
        found: set[Number] = {0}
        sums: set[Number] = {0}
        for count in range(1, self.max_length + 1):
            sums = {total + value for total in sums for value in members}
            found |= {Fraction(total, count) for total in sums}
            if len(found) > MAX_NUMBERS or len(sums) * len(members) > 100 * MAX_NUMBERS:
                raise self._unbounded(sop, f"{len(found)} or more", MAX_NUMBERS)
        return sorted(found)

    def _linear_values(self, sop: SequenceMap) -> list[Number]:
        first, second = self(sop.first), self(sop.second)
        a, b, c = self.linear(sop)
        if len(first) * len(second) > 100 * MAX_NUMBERS:
            raise self._unbounded(sop, f"{len(first)} x {len(second)}", MAX_NUMBERS)
        return sorted({a * one + b * other + c for one in first for other in second})

    def linear(self, sop: SequenceMap) -> tuple[Fraction, Fraction, Fraction]:
        """The (a, b, c) of a x first + b x second + c. Raises DataError where the function is not that."""
        first, second = self(sop.first), self(sop.second)

        def at(one: Any, other: Any) -> Number:
            return number(applied(sop.function, one, other), f"A value of {sop.name or 'a sequence_map'}")

        low, high = (first[0], second[0]), (first[-1], second[-1])
        corner = at(*low)
        a = Fraction(at(high[0], low[1]) - corner) / (high[0] - low[0]) if high[0] != low[0] else Fraction(0)
        b = Fraction(at(low[0], high[1]) - corner) / (high[1] - low[1]) if high[1] != low[1] else Fraction(0)
        c = corner - a * low[0] - b * low[1]
        for one in first[:: max(1, len(first) // _LINEAR_SAMPLE)]:
            for other in second[:: max(1, len(second) // _LINEAR_SAMPLE)]:
                if abs(at(one, other) - (a * one + b * other + c)) > Fraction(1, 10**5):
                    raise DataError(
                        f"{sop.name or 'A sequence_map'} of two numbers is not linear: at ({one}, {other}) it gives "
                        f"{float(at(one, other)):g}.",
                        remedy="Only a x + b y + c is exact in a ReLU layer; make categories of one first.",
                    )
        return a, b, c
