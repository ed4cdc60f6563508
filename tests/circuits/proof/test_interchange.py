"""Interchanges against plain edits; DAS finds the direction that a planted model was given, and only there."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.circuits.graphs import subject as of_zoo
from tomoscope.circuits.proof.controls import untrained_like
from tomoscope.circuits.proof.interchange import (
    Alignment,
    Interchanges,
    align,
    interchange_accuracy,
    interchange_logits,
    random_alignment,
)
from tomoscope.errors import AlignmentError, DataError, ModelError, SiteError
from tomoscope.model import replace
from tomoscope.phantoms.planted import concepts
from tomoscope.phantoms.planted.spaces import random_for
from tomoscope.phantoms.planted.statements import draw_statements

MANY = 512


@cache
def planted(form: str):
    """A specimen, and trials that exchange the name's class: the answer is of both names and places."""
    specimen = concepts.build(form, 0)
    texts, labels = draw_statements(specimen.data["classes"], 2 * MANY, random_for("interchange", 0))
    vocabulary = specimen.subject.tokenizer.get_vocab()
    answers = torch.tensor([vocabulary[a] for a in specimen.data["answers"]])
    base, source = range(MANY), range(MANY, 2 * MANY)
    for row in (*base, *source):
        assert labels["parity"][row] == (labels["name"][row] != labels["place"][row])
    after = torch.tensor([int(labels["name"][s] != labels["place"][b]) for b, s in zip(base, source, strict=True)])
    before = torch.tensor([int(labels["parity"][b]) for b in base])
    subject = specimen.subject
    trials = Interchanges(
        subject.tokens(texts[:MANY]), subject.tokens(texts[MANY:]), answers[after][:, None], answers[1 - after][:, None]
    )
    return specimen, trials, after != before


def where(specimen, concept: str) -> tuple[str, torch.Tensor]:
    known = next(k for k in specimen.card.of("direction") if k.value["concept"] == concept and k.holds)
    return known.value["site"], specimen.data["directions"][concept].double()


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_the_planted_direction_carries_the_variable(form: str) -> None:
    specimen, trials, changed = planted(form)
    site, direction = where(specimen, "name")
    right = interchange_accuracy(specimen.subject, trials, Alignment(direction[None], site))
    assert right.float().mean() == 1.0
    # without an exchange the answer is the base's own: right where the exchange changes nothing
    assert torch.equal(interchange_accuracy(specimen.subject, trials, None), ~changed)
    other = where(specimen, "colour")[1]
    assert torch.equal(interchange_accuracy(specimen.subject, trials, Alignment(other[None], site)), ~changed)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_das_finds_the_planted_direction(form: str) -> None:
    specimen, trials, changed = planted(form)
    site, direction = where(specimen, "name")
    half = torch.arange(MANY // 2)
    found = align(specimen.subject, trials.take(half), site=site, width=1, steps=120)
    held_out = trials.take(half + MANY // 2)
    assert float((found.basis.double() @ direction).abs()) > 0.9
    assert interchange_accuracy(specimen.subject, held_out, found).float().mean() >= 0.98
    moved = changed[MANY // 2 :]
    for seed in range(3):
        drawn = random_alignment(specimen.subject, site, width=1, seed=seed)
        assert interchange_accuracy(specimen.subject, held_out, drawn)[moved].float().mean() < 0.2
    # before the name is written there is nothing to exchange
    early = align(specimen.subject, trials.take(half), site="embed", width=1, steps=30)
    assert interchange_accuracy(specimen.subject, held_out, early).float().mean() < 0.7


def test_an_untrained_model_has_no_variable_to_align() -> None:
    specimen, trials, _ = planted("llama")
    site, _ = where(specimen, "name")
    for kind in ("initial", "shuffled"):
        blank = untrained_like(specimen.subject, seed=0, kind=kind)
        found = align(blank, trials.take(torch.arange(MANY // 2)), site=site, width=1, steps=40)
        right = interchange_accuracy(blank, trials.take(torch.arange(MANY // 2, MANY)), found)
        assert 0.25 < right.float().mean() < 0.75, kind


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "qwen3_moe"])
@pytest.mark.parametrize("site", ["layer.1.resid_post", "layer.1.attn.z", "layer.1.attn.z[head=2]", "layer.0.mlp.out"])
def test_a_full_exchange_is_a_plain_replacement(name: str, site: str) -> None:
    subject = of_zoo(name)
    ids = torch.randint(3, 96, (6, 7), generator=torch.Generator().manual_seed(1)).tolist()
    ids[0] = ids[0][2:]
    base, source = subject.tokens(ids[:3]), subject.tokens(ids[3:])
    trials = Interchanges(base, source, torch.tensor([[5], [6], [7]]), torch.tensor([[8], [9], [10]]))
    for at in ("last", [1, -1]):
        value = subject.read(source, site, at=at)[site]
        expected = subject.last_logits(base, edits=[replace(site, value, at=at)])
        width = value[0].numel() if at == "last" else value[0, 0].numel()
        whole = random_alignment(subject, site, width=width, seed=0, at=at)
        torch.testing.assert_close(interchange_logits(subject, trials, whole), expected, rtol=1e-3, atol=1e-4)
        nothing = interchange_logits(subject, trials, None)
        torch.testing.assert_close(nothing, subject.last_logits(base))


def test_learning_is_seeded_and_leaves_the_model_as_it_was() -> None:
    subject = of_zoo("gpt2")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    wanted = [p.requires_grad for p in subject.model.parameters()]
    ids = torch.randint(3, 96, (12, 6), generator=torch.Generator().manual_seed(2)).tolist()
    answers, wrong = torch.arange(3, 9)[:, None], torch.arange(13, 19)[:, None]
    trials = Interchanges(subject.tokens(ids[:6]), subject.tokens(ids[6:]), answers, wrong)
    one, same, other = (
        align(subject, trials, site="layer.1.resid_mid", width=4, steps=5, batch_size=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.basis, same.basis)
    assert not torch.equal(one.basis, other.basis)
    torch.testing.assert_close(one.basis @ one.basis.T, torch.eye(4), rtol=0, atol=1e-5)
    assert len(one.losses) == 5
    assert one.how["trials"] == 6
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    assert [p.requires_grad for p in subject.model.parameters()] == wanted
    assert all(p.grad is None for p in subject.model.parameters())


def test_mistakes_are_told_before_the_work() -> None:
    subject = of_zoo("gpt2")
    ids = [[3, 4, 5]] * 2
    batch, answers = subject.tokens(ids), torch.tensor([[5], [6]])
    with pytest.raises(AlignmentError, match="2 base"):
        Interchanges(batch, batch, answers, answers[:1])
    with pytest.raises(DataError, match="needs answers"):
        Interchanges(batch, batch, torch.tensor([[-1], [4]]), answers)
    trials = Interchanges(batch, batch, answers, answers + 1)
    with pytest.raises(DataError, match="33 dimensions"):
        align(subject, trials, site="layer.0.resid_post", width=33)
    with pytest.raises(SiteError, match="no single place"):
        align(subject, trials, site="layer.*.resid_post", width=1)
    with pytest.raises(SiteError, match="no vector"):
        align(subject, trials, site="layer.0.attn.pattern", width=1)
    with pytest.raises(ModelError, match="unknown"):
        untrained_like(subject, seed=0, kind="other")
