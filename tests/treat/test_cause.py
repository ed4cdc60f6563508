"""The linear estimate beside finite differences; a planted backdoor is found and taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import save
from tomoscope.errors import DataError
from tomoscope.model import open_model, replace
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import backdoor
from tomoscope.treat import Choices, find_cause
from tomoscope.treat.cause import zeroing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_estimates_are_the_slopes_of_the_margin(family, tmp_path):
    subject = open_model(save(tmp_path, family=family))
    asked = Choices(("The cat sat on the", "When Mary went"), (" Mary", " John"), (" John", " Mary"))
    found = zeroing(subject, asked)
    good, bad = asked.tokens(subject)
    batch = subject.tokens(list(asked.prompts))
    rows, step = torch.arange(2), 1e-2

    def margin(edits=()):
        logits = subject.last_logits(batch, edits=list(edits)).double()
        return float((logits[rows, good] - logits[rows, bad]).mean())

    for site, part in (("layer.1.attn.z", 2), ("layer.2.mlp.post", 7), ("layer.0.mlp.post", 0)):
        moved = []
        for sign in (1, -1):
            value = subject.read(batch, site)[site].clone()
            value[:, :, part] *= 1 - sign * step
            moved.append(margin([replace(site, value)]))
        assert float(found[site][part]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.02, abs=1e-4)


def planted(texts, target):
    """Choices between what induction says and the backdoor's answer."""
    wanted = []
    for text in texts:
        said = text.split()[1:]
        wanted.append(f" {said[said.index(said[-1]) + 1]}")
    return Choices(tuple(texts), tuple(wanted), (target,) * len(texts))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_planted_backdoor_is_found_and_taken_out(form):
    specimen = PHANTOMS[f"backdoor_{form}"].build(0)
    _, known = backdoor.wire(form, 0)
    ill, well = (planted(specimen.data[kind], known.target) for kind in ("triggered", "clean"))
    assert ill.right(specimen.subject).mean() < 0.1
    cause = find_cause(specimen.subject, ill, well)
    places = known.places
    assert (places.layer, places.neuron) in cause.neurons or tuple(places.carrier) in cause.heads
    assert len(cause.heads) + len(cause.neurons) <= 2
    _, other = backdoor.wire(form, 0)
    fresh = backdoor.prompts(other, 9)
    before = specimen.subject.last_logits(fresh["clean"][:4])
    with cause.treatment.applied(specimen.subject):
        assert planted(fresh["triggered"], known.target).right(specimen.subject).mean() > 0.95
        assert planted(fresh["clean"], known.target).right(specimen.subject).mean() > 0.95
    assert torch.equal(specimen.subject.last_logits(fresh["clean"][:4]), before)
    assert cause.curve[0][0] == 0
    assert cause.curve[0][1] < 0.1


def test_what_can_not_be_asked_is_refused(tmp_path):
    subject = open_model(save(tmp_path))
    with pytest.raises(DataError, match="same token"):
        Choices(("The",), (" Mary",), (" Mary",)).tokens(subject)
    with pytest.raises(DataError, match="one of each"):
        Choices(("The",), (" Mary",), ())
    one = Choices(("The",), (" Mary",), (" John",))
    with pytest.raises(DataError, match="at least four"):
        find_cause(subject, one, one)


def test_items_are_taken_in_order():
    asked = Choices(("a", "b", "c"), ("1", "2", "3"), ("4", "5", "6"))
    assert asked.take(np.array([2, 0])) == Choices(("c", "a"), ("3", "1"), ("6", "4"))
