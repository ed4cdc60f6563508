"""The bypassed half of a deep network with a skip, and its twin without one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.phantoms.test_deep import specimen
from tomoscope.concepts.dead import dead_layers, shortfall
from tomoscope.errors import DataError
from tomoscope.phantoms.deep import DEPTH, SKIP

SITES = ["first", *(f"layers.{i}" for i in range(DEPTH))]


def test_the_bypassed_half_is_found_dead():
    made = specimen("build")
    x, y = made.data["labelled"]
    found = dead_layers(made.subject, x, y.numpy(), SITES, n_classes=10)
    assert found.plain.mean() > 0.85
    assert found.noised_at == found.suspects[-1] == f"layers.{SKIP - 1}"
    assert len(found.suspects) >= SKIP // 2
    assert abs(found.cost.value) < 0.01
    assert found.control_cost.low > 0.5
    assert found.dead()
    assert len(found.plain) + len(found.probes.train) + len(found.probes.test) == len(y)
    with pytest.raises(DataError, match="sites"):
        dead_layers(made.subject, x, y.numpy(), SITES[:2], n_classes=10)


def test_the_twin_without_a_skip_suffers_everywhere():
    made = specimen("null")
    x, y = made.data["labelled"]
    found = dead_layers(made.subject, x, y.numpy(), SITES, n_classes=10)
    assert not found.suspects
    assert not found.dead()
    assert found.cost.low > 0.5


def test_short_of_both_sides():
    accuracy = np.array([0.9, 0.5, 0.6, 0.95, 0.8, 0.7])
    np.testing.assert_allclose(shortfall(accuracy), [0, 0.4, 0.3, -0.15, -0.1, 0])
