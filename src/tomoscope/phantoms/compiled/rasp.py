"""The language: sequence operations and selectors, after RASP.

A sequence operation gives one value a position. `tokens` and `indices` (from 0) are given; `select` compares the value
at every key with the value at every query, `aggregate` gathers values over what was selected, `selector_width` counts
it, `map` and `sequence_map` work within a position. Three lines make a program:

    smaller = select(tokens, tokens, operator.lt)                   # predicate(key, query)
    place = selector_width(smaller)
    sort = aggregate(select(place, indices, operator.eq), tokens)

Values are *categorical* (any hashable, finitely many; one direction of the stream each) or *numerical* (one direction
for the number). Aggregating numbers means them, 0 where nothing is selected; aggregating categories copies the one that
is selected, no value (None) where nothing is. No value stays none under a map, and is selected by no selector, negated
or not. Weiss, Goldberg and Yahav, "Thinking like transformers" (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeVar

from tomoscope.errors import DataError

Predicate = Callable[[Any, Any], bool]
_Named = TypeVar("_Named", bound="SOp")


@dataclass(frozen=True, kw_only=True)
class SOp:
    """A sequence operation: one value a position. Equal by what it computes, whatever its name."""

    name: str = field(default="", compare=False)
    """What residual directions and places are called after."""

    @property
    def numerical(self) -> bool:
        """Whether its values are numbers in one direction rather than categories in one each."""
        return False

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """The operations that it reads."""
        return ()

    def named(self: _Named, name: str) -> _Named:
        """The same operation under a name."""
        return replace(self, name=name)

    def map(self, function: Callable[[Any], Any], *, numerical: bool = False) -> SOp:
        """A function of the value at each position; `numerical` makes a number of it."""
        if isinstance(self, Constant):
            return Constant(function(self.value), name=self.name)
        return Map(function, self, numerical)


@dataclass(frozen=True)
class Tokens(SOp):
    """The token at each position."""

    name: str = field(default="tokens", compare=False, kw_only=True)


@dataclass(frozen=True)
class Indices(SOp):
    """Each position's index, from 0 (the token after BOS)."""

    name: str = field(default="indices", compare=False, kw_only=True)


@dataclass(frozen=True)
class Constant(SOp):
    """The same category everywhere; it has no direction of the stream."""

    value: Hashable


@dataclass(frozen=True)
class Map(SOp):
    """A function of one operation's value."""

    function: Callable[[Any], Any]
    source: SOp
    to_number: bool = False

    @property
    def numerical(self) -> bool:
        """As asked for."""
        return self.to_number

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """What it maps."""
        return (self.source,)


@dataclass(frozen=True)
class SequenceMap(SOp):
    """A function of two operations' values; of two numbers, a linear one."""

    function: Callable[[Any, Any], Any]
    first: SOp
    second: SOp
    to_number: bool = False

    @property
    def numerical(self) -> bool:
        """As asked for; always of two numbers."""
        return self.to_number or self.first.numerical

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """What it maps."""
        return (self.first, self.second)


@dataclass(frozen=True)
class Term:
    """One comparison: predicate(key's value, query's value)."""

    keys: SOp
    queries: SOp
    predicate: Predicate


@dataclass(frozen=True)
class Selector:
    """Which keys each query selects: those for which every term holds. Combine with &, | and ~."""

    terms: tuple[Term, ...]

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """Keys and queries of every term."""
        return tuple(sop for term in self.terms for sop in (term.keys, term.queries))

    def __and__(self, other: Selector) -> Selector:
        merged: dict[tuple[SOp, SOp], Predicate] = {}
        for term in (*self.terms, *other.terms):
            pair = (term.keys, term.queries)
            merged[pair] = _both(merged[pair], term.predicate) if pair in merged else term.predicate
        return Selector(tuple(Term(keys, queries, predicate) for (keys, queries), predicate in merged.items()))

    def __invert__(self) -> Selector:
        term = self._joint()
        return Selector((Term(term.keys, term.queries, lambda key, query: not term.predicate(key, query)),))

    def __or__(self, other: Selector) -> Selector:
        return ~(~self & ~other)

    def _joint(self) -> Term:
        """One term that says the same: of pairs of keys and pairs of queries, where there are several."""
        if len(self.terms) == 1:
            return self.terms[0]
        keys = _components(term.keys for term in self.terms)
        queries = _components(term.queries for term in self.terms)

        def predicate(key: Any, query: Any) -> bool:
            key_of, query_of = _split(key, keys), _split(query, queries)
            return all(one.predicate(_value(one.keys, key_of), _value(one.queries, query_of)) for one in self.terms)

        return Term(_paired(keys), _paired(queries), predicate)


@dataclass(frozen=True)
class Aggregate(SOp):
    """What is selected, gathered: the mean of numbers, the copy of a category."""

    selector: Selector
    source: SOp

    @property
    def numerical(self) -> bool:
        """As its source."""
        return self.source.numerical

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """Keys, queries, and what is gathered."""
        return (*self.selector.inputs, self.source)


@dataclass(frozen=True)
class Width(SOp):
    """How many keys are selected, as a category."""

    selector: Selector

    @property
    def inputs(self) -> tuple[SOp, ...]:
        """Keys and queries."""
        return self.selector.inputs


tokens = Tokens()
indices = Indices()


def constant(value: Hashable) -> SOp:
    """The same category at every position, for comparing with it in `select`."""
    return Constant(value)


def select(keys: SOp, queries: SOp, predicate: Predicate) -> Selector:
    """Select the keys for which predicate(key's value, query's value) holds.

    Raises DataError for numerical operations: map them to categories first.
    """
    for what, sop in (("keys", keys), ("queries", queries)):
        _check_sop(sop, f"select's {what}")
        if sop.numerical:
            raise DataError(
                f"select's {what} are numbers ({sop.name or type(sop).__name__}), and attention can't compare numbers "
                "exactly.",
                remedy="Make categories of them with .map(function) first.",
            )
    return Selector((Term(keys, queries, predicate),))


select_all = Selector((Term(Constant(0), Constant(0), lambda key, query: True),))


def aggregate(selector: Selector, source: SOp) -> SOp:
    """Gather `source` over what is selected: the mean of numbers (0 of none), the copy of a category (None of none).

    A program whose copy would gather different categories is refused when it is compiled.
    """
    _check_selector(selector)
    _check_sop(source, "aggregate's source")
    if isinstance(source, Constant):
        raise DataError(
            "A constant can't be aggregated: it has no direction.", remedy="Aggregate tokens.map(lambda token: value)."
        )
    return Aggregate(selector, source)


def selector_width(selector: Selector) -> SOp:
    """How many keys are selected: a category, 0 to the greatest length."""
    _check_selector(selector)
    return Width(selector)


def sequence_map(function: Callable[[Any, Any], Any], first: SOp, second: SOp, *, numerical: bool = False) -> SOp:
    """A function of two operations' values at each position.

    Of two categories any function; of two numbers a linear one. Raises DataError for one of each.
    """
    _check_sop(first, "sequence_map's first operation")
    _check_sop(second, "sequence_map's second operation")
    if isinstance(first, Constant):
        return second.map(lambda value: function(first.value, value), numerical=numerical)
    if isinstance(second, Constant):
        return first.map(lambda value: function(value, second.value), numerical=numerical)
    if first.numerical != second.numerical:
        raise DataError(
            "sequence_map has one operation of numbers and one of categories.",
            remedy="Bring both to one kind with .map(function) or .map(function, numerical=True).",
        )
    return SequenceMap(function, first, second, numerical)


length = replace(Width(select_all), name="length")
"""How many tokens there are (before each query and itself, in a causal program)."""


def order(program: SOp) -> list[SOp]:
    """Every operation of a program, inputs before what reads them, each once."""
    found: dict[SOp, None] = {}

    def visit(sop: SOp) -> None:
        if sop not in found:
            for source in sop.inputs:
                visit(source)
            found[sop] = None

    visit(program)
    return list(found)


def _both(one: Predicate, other: Predicate) -> Predicate:
    return lambda key, query: one(key, query) and other(key, query)


def _pair(first: Any, second: Any) -> tuple[Any, Any]:
    return (first, second)


def _components(sops: Iterable[SOp]) -> list[SOp]:
    """The different operations of which some, perhaps pairs already, are made."""
    found: dict[SOp, None] = {}
    for sop in sops:
        paired = isinstance(sop, SequenceMap) and sop.function is _pair
        found |= dict.fromkeys(_components(sop.inputs)) if paired else {sop: None}
    return list(found)


def _paired(sops: Sequence[SOp]) -> SOp:
    """Several operations as one, of nested pairs ((a, b), c); constants, which have no direction, are left out."""
    varying = [sop for sop in sops if not isinstance(sop, Constant)]
    return reduce(_join, varying) if varying else sops[0]


def _join(first: SOp, second: SOp) -> SOp:
    name = f"{first.name}+{second.name}" if first.name and second.name else ""
    return SequenceMap(_pair, first, second, name=name)


def _split(value: Any, sops: Sequence[SOp]) -> dict[SOp, Any]:
    """The value of each operation, from that of `_paired(sops)`."""
    values: dict[SOp, Any] = {sop: sop.value for sop in sops if isinstance(sop, Constant)}
    varying = [sop for sop in sops if sop not in values]
    for sop in reversed(varying[1:]):
        value, values[sop] = value
    return values | ({varying[0]: value} if varying else {})


def _value(sop: SOp, values: dict[SOp, Any]) -> Any:
    if sop in values:
        return values[sop]
    assert isinstance(sop, SequenceMap)
    return (_value(sop.first, values), _value(sop.second, values))


def _check_sop(sop: Any, what: str) -> None:
    if not isinstance(sop, SOp):
        raise DataError(
            f"{what} is {sop!r}, not a sequence operation.", remedy="Use tokens, indices, constant(value) and the like."
        )


def _check_selector(selector: Any) -> None:
    if not isinstance(selector, Selector):
        raise DataError(f"{selector!r} is not a selector.", remedy="Make one with select(keys, queries, predicate).")
