"""MEMIT against the public reference's numbers, AlphaEdit against its closed form, both in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.treat.edit.made import CONTEXTS, FACTS, FAMILIES, corpus, subject
from tests.treat.edit.test_rome import ASKED, NUMBERS, reference, reference_requests
from tomoscope.errors import EditError
from tomoscope.model import Weights
from tomoscope.treat.edit.keys import average_keys, fact_keys
from tomoscope.treat.edit.memit import PAPER, alphaedit, memit, null_space
from tomoscope.treat.edit.moments import SecondMoments, second_moments


def test_equal_to_the_public_reference():
    model, values = reference(), {}
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(3)]
    wanted = [torch.from_numpy(NUMBERS[f"memit_dW_{name}"]) for name in names]
    for layer in range(3):
        # the reference took each layer's second moments when the layers below had been edited
        with Weights(model).edited(*zip(names[:layer], wanted[:layer], strict=True)):
            values |= second_moments(model, ASKED["corpus"], layers=[layer], held_out=0).values
    moments = SecondMoments(values, 1, (), "", "")
    contexts = [one for group in ASKED["memit_templates"] for one in group]
    made = memit(model, reference_requests(), moments, layers=[0, 1, 2], weight=15.0, contexts=contexts, settings=PAPER)
    for place in range(3):
        np.testing.assert_allclose(made.wanted[place], NUMBERS[f"memit_z_{place}"], rtol=1e-9, atol=1e-11)
    for name, change in zip(names, wanted, strict=True):
        np.testing.assert_allclose(made.treatment.changes[name].dense(), change, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_written_and_targets_approached(family):
    """With no weight on other keys nothing is missing after the layers,"""
    model = subject(family)
    facts = [FACTS[0], FACTS[2]]
    moments = second_moments(model, corpus(), layers=[0, 1])
    made = memit(model, facts, moments, layers=[0, 1], weight=1e-6, contexts=["{}"])
    if family == "gemma2":  # a norm after the projection bounds what it can write
        assert made.notes["missing after"] < 0.8 * made.notes["missing before"]
    else:
        assert made.notes["missing after"] < 1e-3 * made.notes["missing before"]
    assert made.treatment.origin.method == "MEMIT"


def test_alphaedit_is_its_closed_form():
    model = subject("llama")
    moments = second_moments(model, corpus(), layers=[1])
    before = {1: torch.randn(2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    made = alphaedit(model, FACTS, moments, layers=[1], share=0.3, ridge=2.0, kept=before, contexts=CONTEXTS)
    (change,) = made.treatment.changes.values()
    keys = average_keys(fact_keys(model, FACTS, 1, CONTEXTS), halves=True).T
    values, vectors = torch.linalg.eigh(moments.at(1))
    small = vectors[:, values.cumsum(0) <= 0.3 * values.sum()]
    space = small @ small.T
    stands = model.read([one.labelled() for one in FACTS], "layer.1.resid_post", at="subject")["layer.1.resid_post"]
    whole = space @ (keys @ keys.T + before[1].T @ before[1]) + 2.0 * torch.eye(48, dtype=torch.float64)
    expected = torch.linalg.solve(whole, space @ keys @ (made.wanted - stands))
    torch.testing.assert_close(change.dense().T, expected, rtol=1e-8, atol=1e-10)
    # what lies outside the null space is left alone
    torch.testing.assert_close(expected.T @ vectors[:, -3:], torch.zeros(32, 3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert made.notes["null space of layer 1"] == pytest.approx(small.shape[1] / 48)
    assert torch.equal(null_space(moments.at(1), threshold=float(values[4])), vectors[:, :4] @ vectors[:, :4].T)


def test_nonsense_is_refused():
    model = subject("gpt2")
    moments = second_moments(model, corpus(), layers=[1])
    with pytest.raises(EditError, match="no second moments"):
        memit(model, FACTS, moments, layers=[0, 1])
    with pytest.raises(EditError, match="no layer"):
        memit(model, FACTS, moments, layers=[])
    with pytest.raises(EditError, match="small directions"):
        null_space(moments.at(1), threshold=-1.0)
