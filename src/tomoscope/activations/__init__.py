"""Activations of a model over a corpus: harvested, stored in shards, read in random order, led back to their text."""

from __future__ import annotations

from tomoscope.activations.harvest import Slab, harvest
from tomoscope.activations.sources import ArraySource, LiveSource, Rows, Source, first_rows, prefetch
from tomoscope.activations.statistics import Moments
from tomoscope.activations.store import ActivationStore
from tomoscope.activations.writing import StoreWriter, repair, write_store

__all__ = [
    "ActivationStore",
    "ArraySource",
    "LiveSource",
    "Moments",
    "Rows",
    "Slab",
    "Source",
    "StoreWriter",
    "first_rows",
    "harvest",
    "prefetch",
    "repair",
    "write_store",
]
