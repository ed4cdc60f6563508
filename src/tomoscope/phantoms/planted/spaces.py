"""Orthogonal subspaces of the stream, and codes in them: what planted weights are written in.

Every basis vector is orthogonal to the vector of ones, so LayerNorm, like RMSNorm, only rescales a stream that lies in
the subspaces: x -> x sqrt(d_model) / |x|. The basis is a random rotation, so that no part of the stream lies along the
coordinates, as in a trained model. How it can mislead: in a trained model such subspaces are not orthogonal, and there
are more of them than dimensions.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError

Spaces = dict[str, Tensor]
"""Name -> orthonormal basis [d_model, width]; `codes @ space.T` puts codes into the stream."""


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator that depends on what it is for and the seed, so that no two phantoms share their draws."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name}:{seed}".encode()))


def random_for(name: str, seed: int) -> random.Random:
    """The same for choices among things."""
    return random.Random(f"{name}:{seed}")


def subspaces(d_model: int, widths: Mapping[str, int], generator: torch.Generator) -> Spaces:
    """Orthonormal bases [d_model, width] of mutually orthogonal random subspaces, all orthogonal to the ones.

    Raises DataError where they don't fit into d_model - 1 dimensions.
    """
    total = sum(widths.values())
    if total > d_model - 1:
        raise DataError(f"Subspaces of {total} dimensions don't fit a stream of {d_model} less the mean.")
    ones = torch.full((d_model, 1), d_model**-0.5, dtype=torch.float64)
    drawn = torch.randn(d_model, total, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, drawn], dim=1)).Q[:, 1:].float()
    return dict(zip(widths, basis.split(list(widths.values()), dim=1), strict=True))


def unit_codes(count: int, width: int, generator: torch.Generator) -> Float[Tensor, "count width"]:
    """Random unit vectors; their cosines have standard deviation 1 / sqrt(width)."""
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def place_codes(places: int, width: int) -> Float[Tensor, "place width"]:
    """Unit codes of positions: cosine and sine at width / 2 frequencies, 2 pi k / places for k = 1, 2, ..."""
    angles = torch.arange(places, dtype=torch.float64)[:, None] * frequencies(places, width)
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * math.sqrt(2 / width)).float()


def shift_codes(places: int, width: int, offset: int) -> Float[Tensor, "width width"]:
    """The rotation S with place_codes[i] @ S = place_codes[i - offset]."""
    turn = frequencies(places, width) * offset
    cosine, sine = torch.diag(turn.cos()), torch.diag(turn.sin())
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], 0).float()


def frequencies(places: int, width: int) -> Float[Tensor, " pair"]:
    """The angles per position of `place_codes`."""
    return 2 * math.pi / places * torch.arange(1, width // 2 + 1, dtype=torch.float64)
