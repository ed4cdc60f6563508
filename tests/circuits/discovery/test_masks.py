"""Learned masks: the gates' distribution, the size asked for, and a compiled program's edges found."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.test_acdc import wiring
from tomoscope.circuits import Circuit, Graph
from tomoscope.circuits.discovery.masks import gates, learn_mask, open_probability
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError
from tomoscope.phantoms.compiled.specimens import RECIPES


@pytest.mark.parametrize("odds", [-3.0, -1.0, 0.0, 2.0])
def test_gates_are_open_as_often_as_their_closed_form_says(odds: float) -> None:
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.full_like(noise, odds)
    drawn = gates(logits, noise)
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) <= 1.0
    assert float((drawn > 0).double().mean()) == pytest.approx(float(open_probability(logits[:1])), abs=0.005)


def test_the_size_comes_down_to_what_was_asked_for_and_the_result_is_seeded() -> None:
    one = wiring("gpt2")
    found = learn_mask(one, edges=40, steps=60, seed=0)
    assert found.sizes[0] > 0.8 * one.graph.n_edges
    assert found.sizes[-1] == pytest.approx(40, abs=30)
    assert found.circuit.n_edges <= 40
    assert found.circuit.how["asked"] == 40
    assert found.circuit.how["seed"] == 0
    assert len(found.losses) == 60
    again, other = (learn_mask(one, edges=40, steps=5, seed=seed) for seed in (0, 1))
    assert again.losses == learn_mask(one, edges=40, steps=5, seed=0).losses != other.losses
    assert all(p.grad is None for p in one.subject.model.parameters())


def test_it_finds_the_edges_of_a_program() -> None:
    made = next(r for r in RECIPES if r.name == "compiled_histogram").specimen(0)
    pairs = made.data["pairs"]
    subject = made.subject
    graph = Graph.of(subject, position=True)
    clean, corrupted = (subject.tokens([p.text for p in side]) for side in (pairs.clean, pairs.corrupted))
    one = Wiring(subject, clean, graph, ablation=Ablation.paired(corrupted))
    value = next(iter(made.card.of("circuit"))).value
    known = Circuit.of_edges(graph, value["edges"])
    told = learn_mask(one, edges=len(known), steps=150, seed=0).circuit.compare(
        known, ignore=graph.mask([*value["constant"], *value["idle"]])
    )
    assert told.edges.recall == 1.0
    assert told.edges.roc_area is not None
    assert told.edges.roc_area > 0.95


def test_mistakes_are_told() -> None:
    for bad in ({"edges": 0}, {"edges": 10**6}, {"edges": 3, "steps": 0}, {"edges": 3, "damage": "other"}):
        with pytest.raises(DataError):
            learn_mask(wiring("gpt2"), **bad)
