"""From a program to heads and neurons: what each reads and writes, and in which layer it stands.

Every aggregate is a head, every map neurons; a selector's width is a head that also selects BOS and carries 1 there
(so that it gives 1 / (width + 1)) and neurons that turn it into a category. Each stands in the first layer in which all
that it reads has been written.

BOS keeps "nothing is selected" harmless: its score lies halfway below a full selection, so that it is attended where
nothing else is, and it carries nothing. That takes weights, which are made only where they can matter, so that every
edge of the circuit has a use: a default is left out where no input selects nothing (seen by running them all, otherwise
it stays), and what stands at BOS is kept clean only where another position could read it.

Steps: run the program on inputs, find what must be clean at BOS, lower each operation after its inputs.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from tomoscope.errors import DataError
from tomoscope.phantoms.compiled.domains import Domains, applied, may_be_none, number
from tomoscope.phantoms.compiled.neurons import pair_table, steps, table, weighted_sum
from tomoscope.phantoms.compiled.parts import Head, Neurons, Reading, Variable, ceiling, reading
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


@dataclass
class Network:
    """A lowered program: its parts, the variables that embeddings write, and the one that is the answer."""

    heads: list[Head] = field(default_factory=list)
    neurons: list[Neurons] = field(default_factory=list)
    variables: dict[SOp, Variable] = field(default_factory=dict)
    bos: Variable = field(default_factory=lambda: Variable("bos", None))
    output: Variable | None = None

    @property
    def n_layers(self) -> int:
        """Blocks needed."""
        return max(part.time for part in (*self.heads, *self.neurons)) // 2 + 1


def lower(program: SOp, domains: Domains, *, empty: Set[SOp] | None) -> Network:
    """Lower a program.

    Args:
        program: its answer.
        domains: over the vocabulary and lengths it is compiled for.
        empty: the aggregates that select nothing on some input; None where not every input was looked at, and any may.
    """
    if isinstance(program, Tokens | Indices | Constant):
        raise DataError(
            f"The program is only {type(program).__name__.lower()}, which needs no network.",
            remedy="Aggregate or map something.",
        )
    return _Lowering(program, domains, empty).network


class _Lowering:
    def __init__(self, program: SOp, domains: Domains, empty: Set[SOp] | None) -> None:
        self.domains, self.empty = domains, empty
        self.network = Network()
        self.times: dict[Variable, int] = {self.network.bos: -1}
        self.names: set[str] = {"bos"}
        self.sops = order(program)
        self.clean = self._must_be_clean()
        for sop in dict.fromkeys([Tokens(), Indices(), *self.sops]):
            self._lower(sop)
        self.network.output = self.network.variables[program]

    # ---- BOS

    def _may_be_empty(self, sop: SOp) -> bool:
        return self.empty is None or sop in self.empty

    def _nullable(self, sop: SOp) -> bool:
        if isinstance(sop, Aggregate):
            return may_be_none(sop) and self._may_be_empty(sop)
        return may_be_none(sop) and any(self._nullable(source) for source in sop.inputs)

    def _default(self, sop: Aggregate) -> bool:
        return self._may_be_empty(sop) or sop in self.clean

    def _must_be_clean(self) -> set[SOp]:
        """Operations whose directions must be 0 at BOS, because another position reads what stands there."""
        self.clean: set[SOp] = set()
        for sop in reversed(self.sops):
            clean = sop in self.clean
            if isinstance(sop, Aggregate | Width):
                self.clean |= {term.keys for term in sop.selector.terms}
            if isinstance(sop, Aggregate):
                self.clean |= {term.queries for term in sop.selector.terms} if clean else set()
                self.clean |= {sop.source} if self._default(sop) else set()
            elif isinstance(sop, Map) and clean and not sop.source.numerical:
                self.clean.add(sop.source)
            elif isinstance(sop, SequenceMap) and clean:
                # a pair has an answer only where both have a value, so one of them is enough
                both = sop.first.numerical or sop.first == sop.second
                leaf = any(isinstance(source, Tokens | Indices) for source in sop.inputs)
                self.clean |= set(sop.inputs) if both else set() if leaf else {sop.first}
        return self.clean

    # ---- operations

    def _lower(self, sop: SOp) -> None:
        gate = self.network.bos if sop in self.clean else None
        match sop:
            case Tokens() | Indices():
                self._variable(sop, -1)
            case Width():
                self._width(sop)
            case Aggregate():
                source, time = self._read(sop.source), self._attention_time(sop.inputs)
                query, key = self._scores(sop.selector, clean=gate is not None, default=self._default(sop))
                writes = self._variable(sop, time)
                self.network.heads.append(Head(sop, query, key, source, writes, time))
            case Map():
                source, time = self._read(sop.source), self._mlp_time(sop.inputs)
                writes = self._variable(sop, time)
                if sop.source.numerical:
                    ladder = [(value, self._answer(sop, value)) for value in self.domains(sop.source)]
                    self.network.neurons.append(steps(sop, source, ladder, writes, time, gate=gate))
                else:
                    made = table(sop, source, lambda value: self._answer(sop, value), writes, time)
                    self.network.neurons.append(made)
            case SequenceMap():
                self._sequence_map(sop, gate)

    def _sequence_map(self, sop: SequenceMap, gate: Variable | None) -> None:
        first, second = self._read(sop.first), self._read(sop.second)
        time = self._mlp_time(sop.inputs)
        writes = self._variable(sop, time)
        if sop.first.numerical:
            weights = self.domains.linear(sop)
            made = weighted_sum(sop, (first, second), weights, writes, time, gate=gate)
        elif first is second:
            made = table(sop, first, lambda value: self._answer(sop, value, value), writes, time)
        else:
            made = pair_table(sop, (first, second), lambda one, two: self._answer(sop, one, two), writes, time)
        self.network.neurons.append(made)

    def _width(self, sop: Width) -> None:
        query, key = self._scores(sop.selector, clean=False, default=False, width=True)
        time = self._attention_time(sop.inputs)
        share = Variable(self._name(f"{sop.name or 'width'}_share"), None)
        self.times[share] = time
        self.network.heads.append(Head(sop, query, key, self.network.bos, share, time))
        writes = self._variable(sop, time + 1)
        ladder = [(Fraction(1, width + 1), width) for width in reversed(self.domains(sop))]
        gate = self.network.bos if sop in self.clean else None
        self.network.neurons.append(steps(sop, share, ladder, writes, time + 1, gate=gate))

    def _answer(self, sop: Map | SequenceMap, *values: Any) -> Any:
        answer = applied(sop.function, *values)
        return number(answer) if sop.numerical else answer

    # ---- variables and times

    def _variable(self, sop: SOp, time: int) -> Variable:
        name = self._name(sop.name or f"{type(sop).__name__.lower()}_{len(self.network.variables)}")
        if not sop.numerical:
            variable = Variable(name, self.domains(sop))
        elif isinstance(sop, Aggregate):
            # means stay within what is averaged, so the many values they could take need not be listed
            variable = Variable(name, None, self._read(sop.source).bound)
        else:
            variable = Variable(name, None, ceiling(self.domains(sop)))
        self.network.variables[sop] = variable
        self.times[variable] = time
        return variable

    def _name(self, wanted: str) -> str:
        name, count = wanted, 2
        while name in self.names:
            name, count = f"{wanted}_{count}", count + 1
        self.names.add(name)
        return name

    def _read(self, sop: SOp) -> Variable:
        if isinstance(sop, Constant):
            raise DataError("A constant has no direction to read.", remedy="Map tokens to it.")
        return self.network.variables[sop]

    def _ready(self, inputs: tuple[SOp, ...]) -> int:
        return max((self.times[self._read(sop)] for sop in inputs if not isinstance(sop, Constant)), default=-1)

    def _attention_time(self, inputs: tuple[SOp, ...]) -> int:
        return (self._ready(inputs) + 2) // 2 * 2

    def _mlp_time(self, inputs: tuple[SOp, ...]) -> int:
        return (self._ready(inputs) + 1) // 2 * 2 + 1

    # ---- selectors

    def _scores(
        self, selector: Selector, *, clean: bool, default: bool, width: bool = False
    ) -> tuple[Reading, Reading]:
        """Query and key readings whose product is 1 for each term that holds.

        BOS scores as a full selection in a width, half a term less in a default, and 0 otherwise. `clean`: nothing but
        BOS may be selected from BOS.
        """
        bos = self.network.bos
        columns: list[tuple[tuple, tuple]] = []
        level = len(selector.terms) - (0.0 if width else 0.5) if width or default else 0.0
        for term in selector.terms:
            keys, queries = self.domains(term.keys), self.domains(term.queries)
            held = np.array(
                [[bool(applied(term.predicate, key, query)) for key in keys] for query in queries], dtype=float
            )
            no_query = not self._nullable(term.queries) and bool((held == held[:1]).all())
            no_key = not self._nullable(term.keys) and bool((held == held[:, :1]).all())
            if no_query and no_key and held[0, 0] and not clean:
                level -= 1.0  # every key but BOS scores 1: the same as BOS scoring 1 less
            elif held.any():
                columns += self._term_columns(term, held, no_query=no_query, no_key=no_key, clean=clean)
        if level:
            columns.append((({}, 1.0), ({bos: np.array([level])}, 0.0)))
        return reading([query for query, _ in columns]), reading([key for _, key in columns])

    def _term_columns(
        self, term: Term, held: np.ndarray, *, no_query: bool, no_key: bool, clean: bool
    ) -> list[tuple[tuple, tuple]]:
        """Columns of one term; `held` is [query, key]."""
        not_bos = ({self.network.bos: np.array([-1.0])}, 1.0)
        always = ({}, 1.0)
        if (no_query and isinstance(term.queries, Constant)) or (no_query and not clean):
            asked = not_bos if clean else always
            return [(asked, not_bos if no_key else ({self._read(term.keys): held[0]}, 0.0))]
        queries = self._read(term.queries)
        if no_key:
            return [(({queries: held[:, 0]}, 0.0), not_bos)]
        keys = self._read(term.keys)
        if len(held) < held.shape[1]:
            rows = [(held_row, np.eye(len(held))[i]) for i, held_row in enumerate(held) if held_row.any()]
            return [(({queries: one}, 0.0), ({keys: row}, 0.0)) for row, one in rows]
        rows = [(column, np.eye(held.shape[1])[i]) for i, column in enumerate(held.T) if column.any()]
        return [(({queries: column}, 0.0), ({keys: one}, 0.0)) for column, one in rows]
