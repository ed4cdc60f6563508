"""Every planted phantom keeps the contract: names, JSON cards, the same statements on both sides."""

from __future__ import annotations

import pytest
import torch

from tomoscope.phantoms import PHANTOMS, Card
from tomoscope.phantoms.planted import PHANTOMS as PLANTED


@pytest.mark.parametrize("phantom", PLANTED, ids=lambda phantom: phantom.name)
def test_contract(phantom):
    assert PHANTOMS.find(phantom.name) is phantom
    assert phantom.kind == "planted"
    assert 3 <= len(phantom.title.split()) <= 8
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    whole, null = phantom.build(2), phantom.null(2)
    assert torch.equal(torch.rand(2), expected), "building draws from the caller's random state"
    for specimen in (whole, null):
        assert (specimen.card.name, specimen.card.seed) == (phantom.name, 2)
        # a card is JSON: what it says is what is read back
        assert Card.from_json(specimen.card.to_json()) == specimen.card
        assert specimen.subject.facts.parity in (None, 0.0)
        assert not specimen.subject.facts.unsolved
    assert {(k.kind, str(k.value)) for k in whole.card.known} == {(k.kind, str(k.value)) for k in null.card.known}
    assert any(mine.holds and not theirs.holds for mine, theirs in zip(whole.card.known, null.card.known, strict=True))
    assert whole.subject.facts.n_parameters == null.subject.facts.n_parameters
