"""The dead half is dead by plain forwards: whatever it holds, the answers are the same; its twin needs every layer."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.deep import SKIP, trained


@cache
def specimen(which: str):
    return getattr(PHANTOMS["dead_half"], which)(0)


def right(net, x, y, replaced: int | None = None) -> float:
    """Share right, by the network's own layers one after the other, one of them replaced by noise."""
    value = first = net.first(x)
    for i, layer in enumerate(net.layers):
        value = layer(value + first if i == net.skip else value)
        if i == replaced:
            value = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * value.std(0) + value.mean(0)
    return float((net.out(value).argmax(-1) == y).float().mean())


def test_the_half_that_the_skip_passes_by_is_dead():
    made = specimen("build")
    x, y = made.data["labelled"]
    net = made.subject.model
    plain = right(net, x, y)
    assert plain > 0.85
    assert right(net, x, y, SKIP - 1) == pytest.approx(plain, abs=0.005)
    assert right(net, x, y, SKIP) < 0.4
    (known,) = made.card.of("dead")
    assert known.holds
    assert known.value["sites"][-1] == f"layers.{SKIP - 1}"


def test_the_twin_needs_every_layer():
    made = specimen("null")
    x, y = made.data["labelled"]
    plain = right(made.subject.model, x, y)
    assert plain > 0.85
    assert right(made.subject.model, x, y, SKIP - 1) < 0.4
    assert not next(made.card.of("dead")).holds


def test_the_same_seed_gives_the_same_network(monkeypatch):
    monkeypatch.setattr("tomoscope.phantoms.deep.STEPS", 3)
    one, two, other = (trained(seed, skip=SKIP)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["out.weight"], other["out.weight"])
