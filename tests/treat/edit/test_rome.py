"""ROME against the public reference's numbers and its own equations, in every family; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.treat.edit.made import CONTEXTS, FACTS, FAMILIES, corpus, subject
from tomoscope.errors import EditError
from tomoscope.model import open_model
from tomoscope.treat.edit.keys import contexts_of, down_projection, fact_keys
from tomoscope.treat.edit.moments import second_moments
from tomoscope.treat.edit.requests import EditRequest
from tomoscope.treat.edit.rome import rome
from tomoscope.treat.edit.targets import TargetSettings

REFERENCE = Path(__file__).parents[2] / "reference" / "rome"
ASKED = json.loads((REFERENCE / "edits.json").read_text())
NUMBERS = np.load(REFERENCE / "edits.npz")


def reference():
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE / "tok")
    return open_model(REFERENCE, tokenizer=tokenizer, dtype="float64")


def reference_requests():
    return [EditRequest(r["prompt"], r["subject"], r["target_new"]["str"]) for r in ASKED["requests"]]


def test_equal_to_the_public_reference():
    model = reference()
    moments = second_moments(model, ASKED["corpus"], layers=[1], held_out=0)
    np.testing.assert_allclose(moments.at(1), NUMBERS["C"], rtol=1e-9, atol=1e-11)
    for place, request in enumerate(reference_requests()):
        made = rome(model, request, moments, layer=1, form="paper", contexts=ASKED["templates"])
        u, v = made.vectors
        np.testing.assert_allclose(u[0], NUMBERS[f"u_{place}"], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(v[0], NUMBERS[f"v_{place}"], rtol=1e-9, atol=1e-11)
        (change,) = made.treatment.changes.values()
        np.testing.assert_allclose(change.dense(), NUMBERS[f"dW_{place}"], rtol=1e-9, atol=1e-10)
        # the reference prints its losses with three decimals
        np.testing.assert_allclose(made.losses[0], NUMBERS[f"losstrace_{place}"], atol=6e-4)
        assert made.treatment.origin.settings["contexts"] == ASKED["templates"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_averaged_key_gives_the_value_that_was_sought(family):
    model = subject(family)
    before = model.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    moments = second_moments(model, corpus(), layers=[1])
    made = rome(model, FACTS[0], moments, layer=1, contexts=CONTEXTS)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    keys = fact_keys(model, FACTS[:1], 1, CONTEXTS)[0]
    draw = torch.Generator().manual_seed(0)
    other = torch.randn(4, keys.shape[1], dtype=torch.float64, generator=draw).to(keys.dtype)
    # what C^-1 k does not see stays what it was
    seen = moments.solve(1, keys.mean(0)[None])[0].to(keys.dtype)
    other = other - torch.outer(other @ seen, seen) / (seen @ seen)
    module = down_projection(model, 1)
    with torch.no_grad():
        stood = module(other)
        with made.treatment.applied(model):
            torch.testing.assert_close(module(keys).mean(0), made.wanted[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(module(other), stood, rtol=1e-4, atol=1e-4)


def test_several_facts_are_written_one_after_the_other():
    model = subject("llama")
    moments = second_moments(model, corpus(), layers=[1])
    both = rome(model, FACTS[:2], moments, layer=1, contexts=CONTEXTS)
    first = rome(model, FACTS[0], moments, layer=1, contexts=CONTEXTS)
    with first.treatment.applied(model):
        second = rome(model, FACTS[1], moments, layer=1, contexts=CONTEXTS)
    (name,) = both.treatment.changes
    expected = first.treatment.changes[name].dense() + second.treatment.changes[name].dense()
    torch.testing.assert_close(both.treatment.changes[name].dense(), expected, rtol=1e-9, atol=1e-11)
    assert both.treatment.changes[name].right.shape[0] == 2


def test_the_same_seed_gives_the_same_contexts():
    model = subject("gpt2")
    found = contexts_of(model, count=6, seed=1)
    assert found[0] == "{}"
    assert len(found) > 2
    assert all(one.count("{}") == 1 for one in found)
    assert found == contexts_of(model, count=6, seed=1) != contexts_of(model, count=6, seed=2)


def test_nonsense_is_refused():
    model = subject("gpt2")
    moments = second_moments(model, corpus(), layers=[1])
    with pytest.raises(EditError, match="no layer 7"):
        rome(model, FACTS[0], moments, layer=7)
    with pytest.raises(EditError, match="no second moments of layer 0"):
        rome(model, FACTS[0], moments, layer=0)
    with pytest.raises(EditError, match="no form"):
        rome(model, FACTS[0], moments, layer=1, form="better")
    with pytest.raises(EditError, match="first is"):
        rome(model, FACTS[0], moments, layer=1, contexts=["So. {}"])
    with pytest.raises(EditError, match="no edit request"):
        rome(model, [], moments, layer=1)
    said = model.tokenizer.decode([int(model.last_logits([FACTS[0].labelled()]).argmax())])
    if said.startswith(" ") and len(model.tokenizer(said)["input_ids"]) == 1:
        with pytest.raises(EditError, match="already continues"):
            rome(model, EditRequest(FACTS[0].prompt, FACTS[0].subject, said), moments, layer=1)


def test_settings_are_kept_in_the_record():
    model = subject("gpt2")
    moments = second_moments(model, corpus(), layers=[1])
    made = rome(model, FACTS[0], moments, layer=1, settings=TargetSettings(steps=3), seed=4)
    origin = made.treatment.origin
    assert origin.method == "r-ROME"
    assert origin.settings["search"]["steps"] == 3
    assert origin.settings["second_moments"]["tokens"] == moments.tokens
    assert origin.requests[0]["subject"] == "Mary"
    assert origin.seed == 4
    assert made.losses.shape == (1, 3, 5)
