"""Controls on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.concepts.made import planted
from tomoscope.concepts import States
from tomoscope.concepts.controls import (
    description_length,
    distractors,
    median_split,
    selectivity,
    surface_states,
    transfer,
)
from tomoscope.concepts.special import attention_pooled, few_shot, sparse_probe
from tomoscope.errors import DataError


def test_a_concept_is_selective_and_a_lookup_is_not():
    """Types have codes as wide as there are types: a linear probe of the codes learns any labelling of them."""
    generator = torch.Generator().manual_seed(0)
    types = np.repeat(np.arange(30), 8)
    codes = 3 * torch.eye(30)[types] + 0.1 * torch.randn(240, 30, generator=generator)
    labels = types % 2
    concept = torch.randn(240, 30, generator=generator)
    concept[:, 0] += 6.0 * (torch.tensor(labels) - 0.5)
    found = selectivity(States({"codes": codes, "concept": concept}), labels, types, seed=1)
    assert found.at("codes").value < 0.1
    assert found.at("concept").low > 0.2
    assert found.at("concept").n == 30
    assert "undefined" in selectivity(States({"codes": codes}), labels, np.arange(240))


def test_description_length_of_signal_and_noise():
    x, y, _ = planted(400)
    signal, noise = description_length(x, y), description_length(x, np.random.default_rng(0).permutation(y))
    assert signal.compression > 1.5
    assert noise.compression < 1.0
    assert signal.uniform == 400
    assert sum(signal.portions) == pytest.approx(signal.online)


def test_transfer_finds_the_template_that_turns_the_concept_round():
    x, y, concept = planted(300, loud=1.0)
    groups = np.array(["a", "b", "not"])[np.arange(300) % 3]
    turned = x.clone()
    at = torch.as_tensor(groups == "not")
    turned[at] -= 2 * ((turned[at] - 2.0) @ concept)[:, None] * concept
    found = transfer(States({"embed": turned}), y, groups, np.arange(300))
    assert found.right[0, 0, 1] > 0.8
    assert found.right[0, 0, 2] < 0.2
    assert found.right[0, 2, 2] > 0.8
    with pytest.raises(DataError, match="two groups"):
        transfer(States({"embed": x}), y, ["a"] * 300, np.arange(300))


def test_a_distractor_is_named():
    generator = np.random.default_rng(0)
    truth, other = generator.integers(0, 2, 200), generator.integers(0, 2, 200)
    found = distractors(3.0 * other - generator.normal(size=200), {"truth": truth, "topic": other})
    assert next(iter(found)) == "topic"
    assert found["topic"] > 0.9
    assert found["truth"] < 0.65
    assert list(median_split([1, 5, 2, 9])) == [0, 1, 0, 1]


def test_the_surface_of_texts():
    states = surface_states(["a b", "a a a"], [[4, 7], [4, 4, 4]])
    assert states["length"].tolist() == [[2, 3], [3, 5]]
    assert states["tokens"].tolist() == [[1, 1], [3, 0]]


def test_few_examples():
    x, y, _ = planted(400, loud=0.0)
    train, test = np.arange(200), np.arange(200, 400)
    found = few_shot(x, y, train=train, test=test, sizes=(1, 8, 64, 5000), draws=10)
    assert list(found) == [1, 8, 64]
    assert found[1].mean() < found[8].mean() < found[64].mean() + 0.02
    logistic = few_shot(x, y, train=train, test=test, sizes=(64,), draws=3, method="logistic")
    assert logistic[64].mean() > 0.85


def test_one_neuron_is_found():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, generator=generator)
    y = (x[:, 17] > 0).long().numpy()
    first = sparse_probe(x, y, train=np.arange(100), test=np.arange(100, 200), counts=(1, 4))[0]
    assert first.coordinates.tolist() == [17]
    assert first.accuracy > 0.9
    said = first.linear.scores(x)[:, 0, 0] > 0
    assert (said.numpy() == (y == 1)).mean() > 0.9


def test_attention_finds_the_token():
    """One token of eight carries the label, along a direction whose size says where it is."""
    generator = torch.Generator().manual_seed(0)
    n = 300
    x = torch.randn(n, 8, 6, generator=generator)
    mask = (torch.arange(8) < torch.randint(4, 9, (n, 1), generator=generator)).float()
    y = torch.randint(0, 2, (n,), generator=generator)
    place = (torch.rand(n, generator=generator) * mask.sum(1)).long()
    x[torch.arange(n), place, 0] += 6.0
    x[torch.arange(n), place, 1] = 3.0 * (2 * y.float() - 1)
    x = x * mask[..., None]
    probe = attention_pooled(x, mask, y.numpy(), train=np.arange(150), steps=100)
    held = slice(150, n)
    assert ((probe.score(x[held], mask[held]) > 0).long() == y[held]).float().mean() > 0.9
    assert (probe.attention(x[held], mask[held]).argmax(1) == place[held]).float().mean() > 0.7  # chance is 1 in 6
