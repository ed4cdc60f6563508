"""Where variables stand in the residual stream, in a basis under which GPT-2's LayerNorm is linear.

Two dimensions hold +C and -C at every position, very large against everything else, so that the variance LayerNorm
divides by is the same everywhere up to |x|^2 / 2 C^2; its gain undoes the division. What is written sums to 0 over the
dimensions, so that the mean it subtracts is 0: in the basis "axes" by a dimension that takes the opposite of every
write, in the basis "rotated" because all directions are orthogonal to (1, ..., 1).

How it can mislead: C dwarfs the content, so cosines and norms of whole residual vectors say nothing; subtract
`Basis.constant` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from tomoscope.errors import DataError
from tomoscope.phantoms.compiled.parts import Reading, Variable

BasisKind = Literal["axes", "rotated"]
MAX_WIDTH = 2048
SPARE = 3
"""Dimensions that hold no direction: +C, -C, and the one that sums to 0."""
HUM_SHARE = 2.0**-12
"""Of C: enough for positions to be seen when a model is opened, too little for LayerNorm to miss."""
_LARGE = {"float64": 2.0**20, "float32": 2.0**12}
"""C: the error of scale |x|^2 / 2 C^2 and the rounding of sums, C times the type's precision, are about the same."""


@dataclass(frozen=True)
class Basis:
    """Directions of the stream.

    `write`: what 1 in a direction adds to the stream; `read`: what gives it back. `constant`: what every token's
    embedding has, +C and -C; `hum`: what every position's has, which nobody reads; `gain`: LayerNorm's weight.
    """

    write: Float[np.ndarray, "direction d_model"]
    read: Float[np.ndarray, "d_model direction"]
    constant: Float[np.ndarray, " d_model"]
    hum: Float[np.ndarray, " d_model"]
    gain: float


@dataclass(frozen=True)
class Stream:
    """Variables laid out along directions. `places`: variable -> its directions; `spare`: those nobody reads."""

    basis: Basis
    places: Mapping[Variable, np.ndarray]
    labels: tuple[str, ...]
    spare: np.ndarray

    def reads(self, reading: Reading) -> Float[np.ndarray, "d_model to"]:
        """The matrix that reads a reading off the stream."""
        total = np.zeros((len(self.basis.constant), reading.width))
        for variable, matrix in reading.parts.items():
            total += self.basis.read[:, self.places[variable]] @ matrix
        return total

    def read(self, variable: Variable) -> Float[np.ndarray, "d_model direction"]:
        """The matrix that reads one variable."""
        return self.basis.read[:, self.places[variable]]

    def write(self, variable: Variable) -> Float[np.ndarray, "direction d_model"]:
        """What each direction of a variable adds to the stream."""
        return self.basis.write[self.places[variable]]


def lay_out(
    variables: Sequence[Variable],
    d_model: int,
    *,
    n_spare: int,
    kind: BasisKind,
    dtype: str,
    epsilon: float,
    generator: np.random.Generator,
) -> Stream:
    """Give every variable directions in a stream of `d_model` dimensions, in a random order of dimensions."""
    labels = [label for variable in variables for label in variable.labels]
    n = len(labels) + n_spare
    places, start = {}, 0
    for variable in variables:
        places[variable] = np.arange(start, start + variable.size)
        start += variable.size
    order = generator.permutation(d_model)
    constant = np.zeros(d_model)
    constant[order[0]], constant[order[1]] = _LARGE[dtype], -_LARGE[dtype]
    free = order[2:]
    write = np.zeros((n, d_model))
    if kind == "rotated":
        columns = np.concatenate([np.ones((len(free), 1)), generator.standard_normal((len(free), n))], axis=1)
        write[:, free] = np.linalg.qr(columns)[0][:, 1:].T
        read = write.T.copy()
    else:
        write[np.arange(n), free[:n]] = 1.0
        read = write.T.copy()
        write[:, free[-1]] = -1.0
    spare = np.arange(len(labels), n)
    hum = HUM_SHARE * _LARGE[dtype] * write[spare[0]]
    gain = float(np.sqrt((constant @ constant + hum @ hum) / d_model + epsilon))
    return Stream(
        Basis(write, read, constant, hum, gain), places, (*labels, *(f"spare:{i}" for i in range(n_spare))), spare
    )


def width_of(variables: Sequence[Variable], n_heads: int, head_dim: int, n_spare: int) -> int:
    """A d_model that fits every variable and `n_heads` heads of `head_dim`. Raises DataError where it is too large."""
    n = sum(variable.size for variable in variables) + n_spare + SPARE
    d_model = n_heads * max(head_dim, -(-n // n_heads))
    if d_model > MAX_WIDTH:
        largest = sorted(variables, key=lambda variable: -variable.size)[:3]
        listed = ", ".join(f"{variable.name} ({variable.size})" for variable in largest)
        raise DataError(
            f"The program needs a stream of {d_model} dimensions, and {MAX_WIDTH} is the most; the largest variables "
            f"are {listed}.",
            remedy="Give a smaller vocabulary or max_length, or map to fewer categories.",
        )
    return d_model
