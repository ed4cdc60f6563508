"""Synthetic images that vision neuroscience tunes cells with: gratings, edges, discs of colour, arcs.

An image is [3, size, size], 0 where it is grey. Angles are in degrees from the x axis (to the right) towards the y axis
(down, as rows go). Arcs and edges are exact to the pixel's centre, softened over one pixel. How they can mislead: a
channel that likes a stimulus best among these may like something else still better.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 33
"""Pixels of a side: odd, so that one pixel is the middle."""
RED_GREEN = (1 / math.sqrt(2), -1 / math.sqrt(2), 0.0)
YELLOW_BLUE = (1 / math.sqrt(6), 1 / math.sqrt(6), -2 / math.sqrt(6))
"""Orthonormal axes of colour without brightness: hue 0 is red, 90 yellow, 180 green, 270 blue (opponent hues)."""

Image = Float[Tensor, "3 size size"]


def grid(size: int = SIZE) -> tuple[Float[Tensor, "size size"], Float[Tensor, "size size"]]:
    """Each pixel's x and y, 0 in the middle."""
    line = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def along(degrees: float, size: int = SIZE) -> Float[Tensor, "size size"]:
    """How far each pixel lies in a direction."""
    x, y = grid(size)
    return x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))


def grey(brightness: Float[Tensor, "size size"]) -> Image:
    """The same in every colour."""
    return brightness.expand(3, -1, -1).clone()


def grating(degrees: float, *, wavelength: float = 6.0, phase: float = 0.0, size: int = SIZE) -> Image:
    """A sine grating whose brightness changes in this direction."""
    return grey((2 * math.pi / wavelength * along(degrees, size) + math.radians(phase)).sin())


def edge(degrees: float, *, size: int = SIZE) -> Image:
    """A straight edge through the middle, bright in this direction."""
    return grey(soft(along(degrees, size)))


def arc(degrees: float, *, radius: float, inward: bool = True, size: int = SIZE) -> Image:
    """A disc's rim that passes through the middle, seen from the disc's centre in this direction.

    With `inward` the disc is bright; without it the disc lies on the other side and is dark, so that in the middle the
    brightness changes the same way and the curve bends the other.
    """
    side = 1.0 if inward else -1.0
    x, y = grid(size)
    angle = math.radians(degrees)
    distance = torch.hypot(x + side * radius * math.cos(angle), y + side * radius * math.sin(angle))
    return grey(side * soft(radius - distance))


def disc(hue: float, *, radius: float = 6.0, size: int = SIZE) -> Image:
    """A disc of one hue, as bright as the grey around it."""
    axes = torch.tensor([RED_GREEN, YELLOW_BLUE])
    colour = math.cos(math.radians(hue)) * axes[0] + math.sin(math.radians(hue)) * axes[1]
    x, y = grid(size)
    return colour[:, None, None] * (soft(radius - torch.hypot(x, y)) + 1) / 2


def soft(distance: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """-1 outside, 1 inside, a ramp of two pixels between."""
    return distance.clamp(-1, 1)
