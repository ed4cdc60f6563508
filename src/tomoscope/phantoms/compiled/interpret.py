"""What a program means: its values on an input, worked out position by position, without any weights.

`Interpreter` is the oracle for compiled weights and knows nothing of them. It also finds what no static reading of the
program can: copies that would gather different categories (refused), and aggregates that select nothing somewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from random import Random
from typing import Any

from tomoscope.errors import DataError
from tomoscope.phantoms.compiled.domains import applied, number
from tomoscope.phantoms.compiled.rasp import (
    Aggregate,
    Constant,
    Indices,
    Map,
    Selector,
    SequenceMap,
    SOp,
    Term,
    Tokens,
    Width,
    order,
)

EXHAUSTIVE = 6000
"""The most inputs of which all are looked at while compiling."""


class Interpreter:
    """Runs one program on inputs. `empty` collects the aggregates that have selected nothing at some position."""

    def __init__(self, program: SOp, *, causal: bool) -> None:
        self.program, self.causal = program, causal
        self.order = order(program)
        self.empty: set[SOp] = set()
        # operations by number: looking them up by what they compute would hash whole programs at every step
        number_of = {sop: i for i, sop in enumerate(self.order)}
        self._inputs = [tuple(number_of[source] for source in sop.inputs) for sop in self.order]
        self._empty = [False] * len(self.order)
        self._held: dict[tuple[int, int, Any, Any], bool] = {}

    def __call__(self, words: Sequence[Hashable]) -> list[Any]:
        """The program's value at each position; None is no value, numbers are exact."""
        return self._run(words)[-1]

    def trace(self, words: Sequence[Hashable]) -> dict[SOp, list[Any]]:
        """The value of every operation of the program at each position."""
        return dict(zip(self.order, self._run(words), strict=True))

    def _run(self, words: Sequence[Hashable]) -> list[list[Any]]:
        values: list[list[Any]] = []
        for place, sop in enumerate(self.order):
            values.append(self._evaluate(place, sop, words, [values[i] for i in self._inputs[place]]))
        return values

    def _evaluate(self, place: int, sop: SOp, words: Sequence[Hashable], given: list[list[Any]]) -> list[Any]:
        match sop:
            case Tokens():
                return list(words)
            case Indices():
                return list(range(len(words)))
            case Constant():
                return [sop.value] * len(words)
            case Map() | SequenceMap():
                return [self._mapped(sop, *values) for values in zip(*given, strict=True)]
            case Width():
                return [len(chosen) for chosen in self._selected(place, sop.selector, len(words), given)]
            case Aggregate():
                rows = self._selected(place, sop.selector, len(words), given)
                return [self._gathered(place, sop, [given[-1][key] for key in row], words) for row in rows]
        raise DataError(f"{sop!r} is no operation.", remedy="Use the operations of this package.")

    def _mapped(self, sop: Map | SequenceMap, *values: Any) -> Any:
        if any(value is None for value in values):
            # no value: a number read from it is 0
            return 0 if sop.numerical else None
        value = applied(sop.function, *values)
        return number(value) if sop.numerical else value

    def _selected(self, place: int, selector: Selector, n: int, given: list[list[Any]]) -> Iterator[list[int]]:
        columns = [(i, term, given[2 * i], given[2 * i + 1]) for i, term in enumerate(selector.terms)]
        for query in range(n):
            chosen = list(range(query + 1 if self.causal else n))
            for i, term, keys, queries in columns:
                asked = queries[query]
                chosen = [k for k in chosen if self._holds((place, i, keys[k], asked), term)]
            yield chosen

    def _holds(self, case: tuple[int, int, Any, Any], term: Term) -> bool:
        held = self._held.get(case)
        if held is None:
            key, query = case[2:]
            held = key is not None and query is not None and bool(applied(term.predicate, key, query))
            self._held[case] = held
        return held

    def _gathered(self, place: int, sop: Aggregate, chosen: list[Any], words: Sequence[Hashable]) -> Any:
        if not chosen:
            if not self._empty[place]:
                self._empty[place] = True
                self.empty.add(sop)
            return 0 if sop.numerical else None
        if sop.numerical:
            return Fraction(sum(chosen), len(chosen))
        if len(set(chosen)) > 1:
            raise DataError(
                f"{sop.name or 'An aggregate'} copies a category, but on {words!r} different ones are selected "
                f"({', '.join(sorted({repr(value) for value in chosen}))}).",
                remedy="Select one key a query, or aggregate numbers (map with numerical=True), which are averaged.",
            )
        return chosen[0]


def all_inputs(vocabulary: Sequence[Hashable], max_length: int) -> Iterator[tuple[Hashable, ...]]:
    """Every input of 1 to max_length tokens, shorter ones first."""
    for n in range(1, max_length + 1):
        yield from product(vocabulary, repeat=n)


def some_inputs(
    vocabulary: Sequence[Hashable], max_length: int, *, most: int, seed: int
) -> tuple[list[tuple[Hashable, ...]], bool]:
    """All inputs where there are at most `most`, else a tenth of that drawn at random; and whether they are all."""
    if sum(len(vocabulary) ** n for n in range(1, max_length + 1)) <= most:
        return list(all_inputs(vocabulary, max_length)), True
    random = Random(f"{seed}:inputs")
    drawn = (tuple(random.choices(vocabulary, k=random.randint(1, max_length))) for _ in range(most // 10))
    return list(dict.fromkeys(drawn)), False
