"""Models whose answer is known: weights set by hand, compiled programs, and small models trained on a known world."""

from __future__ import annotations

from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.registry import PHANTOMS

__all__ = ["PHANTOMS", "Card", "Known", "Phantom", "Specimen"]
