"""What a program means: its values on an input, worked out position by position, without any weights.

`Interpreter` is the oracle for compiled weights and knows nothing of them. It also finds what no static reading of the
program can: copies that would gather different categories (refused), and aggregates that select nothing somewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
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
        self._held: dict[tuple[int, Any, Any], bool] = {}

    def __call__(self, words: Sequence[Hashable]) -> list[Any]:
        """The program's value at each position; None is no value, numbers are fractions."""
        return self.trace(words)[self.program]

    def trace(self, words: Sequence[Hashable]) -> dict[SOp, list[Any]]:
        """The value of every operation of the program at each position."""
        values: dict[SOp, list[Any]] = {}
        for sop in self.order:
            values[sop] = self._evaluate(sop, words, values)
        return values

    def _evaluate(self, sop: SOp, words: Sequence[Hashable], values: dict[SOp, list[Any]]) -> list[Any]:
        match sop:
            case Tokens():
                return list(words)
            case Indices():
                return list(range(len(words)))
            case Constant():
                return [sop.value] * len(words)
            case Map():
                return [self._mapped(sop, value) for value in values[sop.source]]
            case SequenceMap():
                pairs = zip(values[sop.first], values[sop.second], strict=True)
                return [self._mapped(sop, one, other) for one, other in pairs]
            case Width():
                return [len(chosen) for chosen in self._selected(sop.selector, len(words), values)]
            case Aggregate():
                rows = self._selected(sop.selector, len(words), values)
                return [self._gathered(sop, [values[sop.source][key] for key in row], words) for row in rows]
        raise DataError(f"{sop!r} is no operation.", remedy="Use the operations of this package.")

    def _mapped(self, sop: Map | SequenceMap, *values: Any) -> Any:
        if any(value is None for value in values):
            # no value: a number read from it is 0
            return Fraction(0) if sop.numerical else None
        value = applied(sop.function, *values)
        return number(value) if sop.numerical else value

    def _selected(self, selector: Selector, n: int, values: dict[SOp, list[Any]]) -> Iterator[list[int]]:
        columns = [(term, values[term.keys], values[term.queries]) for term in selector.terms]
        for query in range(n):
            keys = range(query + 1 if self.causal else n)
            yield [k for k in keys if all(self._holds(term, key[k], asked[query]) for term, key, asked in columns)]

    def _holds(self, term: Term, key: Any, query: Any) -> bool:
        if key is None or query is None:
            return False
        place = (id(term), key, query)
        if place not in self._held:
            self._held[place] = bool(applied(term.predicate, key, query))
        return self._held[place]

    def _gathered(self, sop: Aggregate, chosen: list[Any], words: Sequence[Hashable]) -> Any:
        if not chosen:
            self.empty.add(sop)
            return Fraction(0) if sop.numerical else None
        if sop.numerical:
            return sum(chosen, Fraction(0)) / len(chosen)
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
    """All inputs where there are at most `most`, else as many drawn at random; and whether they are all."""
    if sum(len(vocabulary) ** n for n in range(1, max_length + 1)) <= most:
        return list(all_inputs(vocabulary, max_length)), True
    random = Random(f"{seed}:inputs")
    drawn = (tuple(random.choices(vocabulary, k=random.randint(1, max_length))) for _ in range(most))
    return list(dict.fromkeys(drawn)), False


def examine(interpreter: Interpreter, inputs: Iterable[Sequence[Hashable]]) -> None:
    """Run a program on inputs for what only running shows; see `Interpreter`. Raises DataError as it does."""
    for words in inputs:
        interpreter(words)
