"""The circuit on the card is what the weights do: by what is written and read, and by cutting edges."""

from __future__ import annotations

import pytest
import torch

from tests.phantoms.compiled.oracles import CASES, Weights
from tomoscope.phantoms.compiled.interpret import all_inputs
from tomoscope.phantoms.compiled.weights import LOGIT

LAYOUTS = {"plain": {}, "crowded": {"extra_heads": 2, "extra_neurons": 4, "basis": "rotated", "seed": 3}}
NO_CHANGE, CHANGE = 1e-6, 0.02
"""In units of an answer (1 of a one-hot, or of the number)."""


SILENT = {"induction": {("embed", "a0.h0<k>"), ("embed", "a1.h0<k>")}}
"""At the first position nothing is before; what the previous-token heads would gather there is selected by no one."""


def batches(compiled, n):
    """Token ids [input, position] with BOS, of every length; at most n of each."""
    words, generator = compiled.words, torch.Generator().manual_seed(0)
    for length in range(1, compiled.shape.max_length + 1):
        rows = [
            [0, *(words.vocabulary[v] for v in row)]
            for row in all_inputs(tuple(words.vocabulary), length)
            if len(row) == length
        ]
        ids = torch.tensor(rows)
        yield ids[torch.randperm(len(ids), generator=generator)[:n]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_edges_are_overlaps_of_what_is_written_and_read(name, layout):
    compiled = CASES[name].compile(**LAYOUTS[layout])
    edges, overlaps = Weights(compiled.model).circuit()
    assert edges == set(compiled.circuit.edges)
    # nothing in between: an overlap is there, or it is rounding
    assert not [value for value in overlaps if 1e-9 < value < 1e-3]


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_the_models(name):
    compiled = CASES[name].compile(**LAYOUTS["crowded"])
    weights = Weights(compiled.model)
    for ids in batches(compiled, 8):
        torch.testing.assert_close(weights.forward(ids)[0], compiled.model(ids).logits, rtol=0, atol=1e-6)


def replacements(weights, ids):
    """What a cut edge may carry instead, by name: nothing (the constant aside), or another input's, out of place."""
    out = weights.forward(ids)[1]
    zero = {node: torch.zeros_like(value) for node, value in out.items()}
    zero["embed"] = zero["embed"] + weights.constant
    zero["position"] = zero["position"] + weights.hum
    yield zero
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        rows = torch.randperm(len(ids), generator=generator)
        columns = torch.randperm(ids.shape[1], generator=generator)
        yield {node: value[rows][:, columns] for node, value in out.items()}


@torch.no_grad()
def effect(compiled, weights, ids, plain, cut, other):
    """The largest change of an answer, in units of one answer; the answer at BOS means nothing."""
    change = (weights.forward(ids, cut, other)[0] - plain)[:, 1:]
    return float(change.abs().max()) / (LOGIT if compiled.words.answers else 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_cutting_every_other_edge_changes_nothing(name, layout):
    compiled = CASES[name].compile(**LAYOUTS[layout])
    weights = Weights(compiled.model)
    cut = set(weights.edges()) - set(compiled.circuit.edges)
    for ids in batches(compiled, 40):
        plain = weights.forward(ids)[0]
        for other in replacements(weights, ids):
            assert effect(compiled, weights, ids, plain, cut, other) < NO_CHANGE


@pytest.mark.parametrize("name", CASES)
def test_cutting_any_edge_of_the_circuit_changes_an_answer(name):
    compiled = CASES[name].compile()
    weights = Weights(compiled.model)
    idle, silent = set(compiled.circuit.edges), set(compiled.circuit.edges)
    for ids in reversed(list(batches(compiled, 80))):
        plain = weights.forward(ids)[0]
        nothing, *others = replacements(weights, ids)
        idle = {edge for edge in idle if effect(compiled, weights, ids, plain, {edge}, nothing) < CHANGE}
        silent = {
            edge for edge in silent & idle
            if all(effect(compiled, weights, ids, plain, {edge}, other) < CHANGE for other in others)
        }  # fmt: skip
    assert idle == set(compiled.circuit.idle)
    assert silent & idle == SILENT.get(name, set())


@pytest.mark.parametrize("name", CASES)
def test_constant_edges_carry_the_same_in_prompts_of_one_length(name):
    compiled = CASES[name].compile(max_length=4)
    weights = Weights(compiled.model)
    ids = list(batches(compiled, 80))[-1]
    out = weights.forward(ids)[1]
    for edge, carried in compiled.circuit.edges.items():
        seen = out[edge[0]][:, 1:] if carried != ("bos",) else out[edge[0]]
        places = compiled.stream.places
        columns = [compiled.stream.basis.read[:, places[v]] for v in places if v.name in carried]
        values = seen @ torch.cat([torch.from_numpy(c) for c in columns], dim=1)
        assert (float((values - values[:1]).abs().max()) < 1e-6) == (edge in compiled.circuit.constant), edge
