"""Parts taken out by their weights equal the same parts taken out of the run; undone to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import ZOO
from tomoscope.errors import EditError
from tomoscope.model import build_subject, project_out, replace
from tomoscope.treat import remove_directions, remove_heads, remove_neurons, remove_parts
from tomoscope.treat.bake import orthogonalised
from tomoscope.treat.cause import without

FAMILIES = ["gpt2", "llama", "gpt_neox", "gptj", "qwen2", "gemma2"]
IDS = torch.tensor([[5, 9, 17, 33, 8], [4, 60, 12, 7, 3]])


@pytest.fixture(params=FAMILIES)
def subject(request):
    return build_subject(ZOO[request.param].build(), name=request.param)


def bits(subject):
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def edited(subject, site, change):
    """Logits of a run in which a site's value was changed."""
    value = subject.read(IDS, site)[site].clone()
    change(value)
    return subject.last_logits(IDS, edits=[replace(site, value)])


def test_a_removed_head_is_one_that_writes_nothing(subject):
    before = bits(subject)
    treatment = remove_heads(subject, [(1, 2), (1, 0)])

    def emptied(value):
        value[:, :, [0, 2]] = 0

    expected = edited(subject, "layer.1.attn.z", emptied)
    with treatment.applied(subject):
        torch.testing.assert_close(subject.last_logits(IDS), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert treatment.origin.requests == ({"layer": 1, "head": 2}, {"layer": 1, "head": 0})


def test_a_removed_neuron_is_one_that_writes_nothing(subject):
    treatment = remove_neurons(subject, [(2, 5), (2, 11)])

    def emptied(value):
        value[:, :, [5, 11]] = 0

    expected = edited(subject, "layer.2.mlp.post", emptied)
    with treatment.applied(subject):
        torch.testing.assert_close(subject.last_logits(IDS), expected, rtol=1e-4, atol=1e-5)


def test_parts_are_taken_out_of_a_run_as_out_of_the_weights(subject):
    heads, neurons = [(1, 2), (1, 0), (0, 3)], [(2, 5), (2, 11), (0, 1)]
    tried = subject.last_logits(IDS, edits=without(subject, heads, neurons))
    assert not torch.allclose(tried, subject.last_logits(IDS), rtol=1e-3, atol=1e-3)
    treatment = remove_parts(subject, heads, neurons)
    with treatment.applied(subject):
        torch.testing.assert_close(subject.last_logits(IDS), tried, rtol=1e-4, atol=1e-5)
    assert len(treatment.origin.requests) == 6


def test_a_mean_stands_in_for_what_is_removed():
    subject = build_subject(ZOO["gpt2"].build(), name="gpt2")
    rows = [row.tolist() for row in IDS] + [[7, 7, 9]]
    z = torch.cat([subject.read([row], "layer.1.attn.z")["layer.1.attn.z"][0] for row in rows])
    mean = z.double().mean(0)[3].float()

    def averaged(value):
        value[:, :, 3] = mean

    expected = edited(subject, "layer.1.attn.z", averaged)
    with remove_heads(subject, [(1, 3)], texts=rows).applied(subject):
        torch.testing.assert_close(subject.last_logits(IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_removed_direction_is_written_nowhere(family):
    subject = build_subject(ZOO[family].build(), name=family)
    before = bits(subject)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    treatment = remove_directions(subject, [vector])
    expected = orthogonalised(subject, [vector]).last_logits(IDS)
    every = subject.last_logits(IDS, edits=[
        project_out(site, vector[None])
        for i in range(3) for site in (f"layer.{i}.resid_pre", f"layer.{i}.attn.out", f"layer.{i}.mlp.out")
    ])  # fmt: skip
    with treatment.applied(subject):
        torch.testing.assert_close(subject.last_logits(IDS), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(subject.last_logits(IDS), every, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_what_is_not_there_is_refused():
    subject = build_subject(ZOO["llama"].build(), name="llama")
    for wrong in ([(9, 0)], [(0, 9)], []):
        with pytest.raises(EditError):
            remove_heads(subject, wrong)
        with pytest.raises(EditError):
            remove_neurons(subject, [(a, 10_000 if b == 9 else b) for a, b in wrong])
    with pytest.raises(EditError, match="no bias"):
        remove_heads(subject, [(0, 0)], texts=[[5, 6, 7]])
