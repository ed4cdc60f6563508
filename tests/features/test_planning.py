"""The plan's numbers by hand, and against figures that were published."""

from __future__ import annotations

import pytest

from tomoscope.errors import DataError
from tomoscope.features import plan_features

SIZES = {"model_params": 70e9, "d_model": 8192, "latents": 30e6, "tokens": 8e9}


def test_the_numbers_are_the_formulas():
    plan = plan_features(**SIZES, k=100)
    assert plan.value("harvest") == pytest.approx(1.12e21)
    assert plan.value("training, sparse") == pytest.approx((2 * 8192 * 30e6 + 8 * 100 * 8192) * 8e9)
    assert plan.value("training, if all were dense") / plan.value("training, sparse") == pytest.approx(6, rel=1e-3)
    assert plan.value("activations") == pytest.approx(8e9 * 16388)
    assert plan.value("training state") == pytest.approx((2 * 8192 * 30e6 + 30e6 + 8192) * 14)
    assert plan.value("training hours") == pytest.approx(plan.value("training, sparse") / (989e12 * 0.5) / 3600)
    assert plan.value("shards") == -(-8e9 * 16388 // 2**31)
    hours = sum(plan.value(f"{part} hours") for part in ("harvest", "training", "dashboard"))
    assert plan.value("compute") == pytest.approx(3 * hours)
    assert plan_features(**SIZES, price=6.0).value("compute") == pytest.approx(
        2 * plan_features(**SIZES).value("compute")
    )
    assert all(line.formula for line in plan.lines)


def test_published_figures_come_out():
    # Gemma Scope: 8B tokens of Gemma 2 9B (d 3584) in fp32 take about 100 TiB a site
    gemma = plan_features(model_params=9e9, d_model=3584, latents=131_072, tokens=8e9, bytes_a_number=4)
    assert gemma.value("activations") / 2**40 == pytest.approx(104, rel=0.05)
    # delphi: 100k features scored by fuzzing and detection for about 676 + 588 dollars
    labels = plan_features(**SIZES, labelled=1e5).value("labels by a language model")
    assert labels == pytest.approx(676 + 588 + 20)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(DataError, match="tokens is 0"):
        plan_features(**SIZES | {"tokens": 0})
    with pytest.raises(DataError, match="H10"):
        plan_features(**SIZES, hardware="H10")
    with pytest.raises(DataError, match="more than the model"):
        plan_features(**SIZES, depth=2.0)
    with pytest.raises(DataError, match="no 'harvst'"):
        plan_features(**SIZES).value("harvst")
