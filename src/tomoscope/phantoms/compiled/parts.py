"""The pieces of a compiled network before they have a place in the stream: variables, heads and neurons.

A variable is a subspace of the residual stream: one direction a category, or one for a number. Heads and neurons read
and write variables through small matrices. BOS is a variable too: 1 at the first position, which stands for "nothing".

Layers are counted in half steps: attention of layer l is time 2 l, its MLP 2 l + 1; embeddings are -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float

from tomoscope.phantoms.compiled.rasp import SOp

Matrix = Float[np.ndarray, "from to"]


@dataclass(frozen=True, eq=False)
class Variable:
    """A subspace of the stream with a name; equal only to itself.

    `values`: its categories, None for a number. `bound`: the largest absolute value of a direction.
    """

    name: str
    values: tuple[Any, ...] | None
    bound: float = 1.0

    @property
    def size(self) -> int:
        """Directions."""
        return 1 if self.values is None else len(self.values)

    @property
    def labels(self) -> list[str]:
        """A name for each direction."""
        return [self.name] if self.values is None else [f"{self.name}:{value}" for value in self.values]


@dataclass(frozen=True, eq=False)
class Reading:
    """A linear reading of variables: sum over them of [direction, to] matrices, and a bias [to]."""

    parts: Mapping[Variable, Matrix]
    bias: Float[np.ndarray, " to"]

    @property
    def variables(self) -> tuple[Variable, ...]:
        """What is truly read: those whose matrix is not all zero."""
        return tuple(variable for variable, matrix in self.parts.items() if np.any(matrix))

    @property
    def width(self) -> int:
        """Columns."""
        return len(self.bias)


@dataclass(frozen=True, eq=False)
class Head:
    """One attention head: scores are query . key in units of one selection; it copies `value` to `writes`."""

    sop: SOp
    query: Reading
    key: Reading
    value: Variable
    writes: Variable
    time: int


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons of one MLP: relu(reading) @ out + out_bias goes to `writes`."""

    sop: SOp
    reading: Reading
    out: Matrix
    out_bias: Float[np.ndarray, " to"]
    writes: Variable
    time: int


def reading(columns: Sequence[tuple[Mapping[Variable, np.ndarray], float]]) -> Reading:
    """A reading from its columns, each a bias and a vector for every variable it reads."""
    variables = dict.fromkeys(variable for parts, _ in columns for variable in parts)
    matrices = {
        variable: np.stack([parts.get(variable, np.zeros(variable.size)) for parts, _ in columns], axis=1)
        for variable in variables
    }
    return Reading(matrices, np.array([bias for _, bias in columns], dtype=float))


def hot(variable: Variable, value: Any) -> np.ndarray:
    """The vector of one value of a variable: its category's direction, or the number."""
    if variable.values is None:
        return np.array([float(value)])
    vector = np.zeros(variable.size)
    vector[variable.values.index(value)] = 1.0
    return vector


def ceiling(values: Sequence[int | Fraction]) -> float:
    """The largest absolute value of numbers, at least 1."""
    return max([1.0, *(abs(float(value)) for value in values)])
