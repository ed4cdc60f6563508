"""What a model represents, where, and whether it uses it: probes, truth without labels, directions, erasure.

One `Direction` is read by probes, written by steering and removed by erasure.
"""

from __future__ import annotations

from tomoscope.concepts.direction import Direction, affine, load_direction
from tomoscope.concepts.linear import Linear, fit
from tomoscope.concepts.probes import Probes, train_probes
from tomoscope.concepts.states import States, collect

__all__ = [
    "Direction",
    "Linear",
    "Probes",
    "States",
    "affine",
    "collect",
    "fit",
    "load_direction",
    "train_probes",
]
