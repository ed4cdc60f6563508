"""Compiled programs' circuits, edge by edge: exact ablation and ACDC rank every edge right, gradients nearly so."""

from __future__ import annotations

from functools import cache

import pytest

from tomoscope.errors import DataError
from tomoscope.exams.calibration.known_circuits import METHODS, rank_edges
from tomoscope.phantoms.compiled.specimens import RECIPES

QUICK = ("compiled_histogram", "compiled_previous_token", "compiled_fraction_so_far", "compiled_sort_unique")


@cache
def specimen(name: str, seed: int):
    return next(recipe for recipe in RECIPES if recipe.name == name).specimen(seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", QUICK)
def test_exact_zero_ablation_and_acdc_are_perfect(name: str, seed: int) -> None:
    zero = rank_edges(specimen(name, seed), "zero")
    assert zero.area == 1.0
    assert zero.known >= 4
    acdc = rank_edges(specimen(name, seed), "ACDC", resamples=2)
    assert acdc.area == acdc.low == acdc.overlap == 1.0
    assert rank_edges(specimen(name, seed), "paired").area == 1.0


@pytest.mark.parametrize("name", QUICK)
def test_integrated_gradients_come_near(name: str) -> None:
    assert rank_edges(specimen(name, 0), "EAP-IG-inputs").area >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES if recipe.name not in QUICK])
def test_every_other_program(name: str) -> None:
    assert rank_edges(specimen(name, 0), "zero").area == 1.0
    assert rank_edges(specimen(name, 0), "ACDC", pairs=32).area == 1.0
    assert rank_edges(specimen(name, 0), "EAP-IG-inputs", pairs=32, steps=4000).area >= 0.95


def test_an_unknown_method_is_told() -> None:
    with pytest.raises(DataError, match="EAP-IG-inputs"):
        rank_edges(specimen(QUICK[0], 0), "EAPIG")
    assert len(METHODS) == 6
