"""MLPs of a compiled network: tables of categories, steps of a number, and sums of two numbers, exactly.

- A *table* has a neuron for every category (or pair) that gives something: relu(2 x - 1), relu(2 (x + y) - 3). At 0 and
  1 it is far from its kink, so a neuron is clearly on or clearly off and has a gradient only where it is on.
- *Steps* of a number have two neurons for each place where the answer changes, midway between possible numbers: their
  difference is 0 below and exactly 1 above, which removes rounding noise. The gradient of a step is 0 at every possible
  number: methods that follow gradients see nothing through it, exact patching does.
- A *sum* is one neuron, kept on by a bias.

At BOS a table gives nothing, because BOS has no category. Steps and sums with a constant are *gated* where it matters:
BOS switches their neurons off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from tomoscope.phantoms.compiled.domains import Number
from tomoscope.phantoms.compiled.parts import Neurons, Reading, Variable, hot, reading
from tomoscope.phantoms.compiled.rasp import SOp

Gate = Variable | None
"""BOS where the neurons must be silent there, else None."""


def table(sop: SOp, source: Variable, function: Callable[[Any], Any], writes: Variable, time: int) -> Neurons:
    """Neurons that look a category up: one for each different answer."""
    groups: dict[Any, np.ndarray] = {}
    for value in source.values or ():
        answer = function(value)
        groups[answer] = groups.get(answer, 0.0) + hot(source, value)
    rows = [(vector, hot(writes, answer)) for answer, vector in groups.items()]
    rows = [(vector, out) for vector, out in rows if out.any()]
    columns = [({source: 2.0 * vector}, -1.0) for vector, _ in rows]
    return _neurons(sop, columns, [out for _, out in rows], np.zeros(writes.size), writes, time)


def pair_table(
    sop: SOp, sources: tuple[Variable, Variable], function: Callable[[Any, Any], Any], writes: Variable, time: int
) -> Neurons:
    """Neurons that look a pair of categories up, one for each pair with an answer that is not 0."""
    first, second = sources
    columns, outs = [], []
    for one in first.values or ():
        for other in second.values or ():
            out = hot(writes, function(one, other))
            if out.any():
                columns.append(({first: 2.0 * hot(first, one), second: 2.0 * hot(second, other)}, -3.0))
                outs.append(out)
    return _neurons(sop, columns, outs, np.zeros(writes.size), writes, time)


def steps(
    sop: SOp,
    source: Variable,
    ladder: Sequence[tuple[Number, Any]],
    writes: Variable,
    time: int,
    *,
    gate: Gate,
) -> Neurons:
    """Neurons that turn a number into an answer; `ladder` has each possible number, ascending, with its answer."""
    columns, outs = [], []
    for (low, before), (high, after) in pairwise(ladder):
        if before == after:
            continue
        slope, middle = 2.0 / float(high - low), float(low + high) / 2.0
        change = hot(writes, after) - hot(writes, before)
        columns += [
            ({source: np.array([slope])}, 0.5 - slope * middle),
            ({source: np.array([slope])}, -0.5 - slope * middle),
        ]
        outs += [change, -change]
    return _gated(sop, columns, outs, hot(writes, ladder[0][1]), writes, time, gate)


def weighted_sum(
    sop: SOp,
    sources: tuple[Variable, Variable],
    weights: tuple[Fraction, Fraction, Fraction],
    writes: Variable,
    time: int,
    *,
    gate: Gate,
) -> Neurons:
    """One neuron that adds a x first + b x second, shifted so that it never switches off, and the constant c."""
    a, b, c = map(float, weights)
    first, second = sources
    shift = abs(a) * first.bound + abs(b) * second.bound + 1.0
    vectors = {first: np.array([a])}
    vectors[second] = vectors.get(second, np.zeros(1)) + np.array([b])
    return _gated(sop, [(vectors, shift)], [np.ones(1)], np.array([c - shift]), writes, time, gate if c else None)


def _gated(sop: SOp, columns: list, outs: list, base: np.ndarray, writes: Variable, time: int, gate: Gate) -> Neurons:
    if gate is None:
        return _neurons(sop, columns, outs, base, writes, time)
    # enough to switch any neuron off, whatever stands in the variables at BOS
    shut = [({**parts, gate: -np.array([_most(parts) + abs(bias) + 1.0])}, bias) for parts, bias in columns]
    if base.any():
        shut.append(({gate: np.array([-1.0])}, 1.0))
        outs = [*outs, base]
    return _neurons(sop, shut, outs, np.zeros(writes.size), writes, time)


def _most(parts: dict[Variable, np.ndarray]) -> float:
    return sum(float(np.abs(vector).sum()) * variable.bound for variable, vector in parts.items())


def _neurons(sop: SOp, columns: list, outs: list, base: np.ndarray, writes: Variable, time: int) -> Neurons:
    inner = reading(columns) if columns else Reading({}, np.zeros(0))
    out = np.stack(outs) if outs else np.zeros((0, writes.size))
    return Neurons(sop, inner, out, base, writes, time)
