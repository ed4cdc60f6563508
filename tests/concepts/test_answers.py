"""Completions against a plain forward, and causal effects against edits written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.exams.world import whole_words
from tests.zoo import ZOO
from tomoscope.concepts import Direction, collect, use
from tomoscope.concepts.answers import calibrated, completion_log_probs, contextual, log_odds
from tomoscope.concepts.states import token_states
from tomoscope.concepts.use import causal_effect
from tomoscope.errors import PromptError
from tomoscope.model import add, build_subject

TEXTS = ["When Mary and John went to the store", "Then Tom", "The doctor said that he"]


@pytest.fixture(scope="module")
def subject():
    tokenizer = whole_words()
    return build_subject(ZOO["llama"].build(vocab=len(tokenizer)), tokenizer=tokenizer)


def by_hand(subject, text, completion, edits=()):
    ids = subject.tokenizer(text)["input_ids"]
    tail = subject.tokenizer(text + completion)["input_ids"][len(ids) :]
    said = subject.run([[*ids, *tail]], edits=edits).logits[0].log_softmax(-1)
    return sum(float(said[len(ids) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize("choices", [(" Mary", " John"), (" he", " went to the store")])
def test_completions_are_as_by_hand(subject, choices):
    found = completion_log_probs(subject, TEXTS, [choices] * 3, batch_size=2)
    expected = [[by_hand(subject, text, one) for one in choices] for text in TEXTS]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    edit = add("layer.0.resid_post", torch.ones(subject.facts.d_model))
    steered = completion_log_probs(subject, TEXTS, [choices] * 3, edits=[edit])
    expected = [[by_hand(subject, text, one, [edit]) for one in choices] for text in TEXTS]
    np.testing.assert_allclose(steered.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_rows_and_the_prompts_last_token(subject):
    choices = [(" he", " went to the store")] * 3
    width = subject.facts.d_model
    last = add("layer.0.resid_post", torch.ones(width), at="last", rows=[1])
    found = completion_log_probs(subject, TEXTS, choices, edits=[last], batch_size=2)
    plain = completion_log_probs(subject, TEXTS, choices)
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-4)
    place = len(subject.tokenizer(TEXTS[1])["input_ids"]) - 1
    expected = by_hand(subject, TEXTS[1], choices[1][1], [add("layer.0.resid_post", torch.ones(width), at=place)])
    assert float(found[1, 1]) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(PromptError, match="lists of completions"):
        completion_log_probs(subject, TEXTS, choices[:2])


def test_odds():
    odds = log_odds(torch.tensor([[0.0, 1.0], [3.0, 1.0], [5.0, 1.0]]))
    assert odds.tolist() == [-1, 2, 4]
    assert calibrated(odds, torch.tensor([True, True, True])).tolist() == [-3, 0, 2]


def test_states_in_any_order_are_as_one_read(subject):
    states = collect(subject, TEXTS, ["embed", "layer.*.attn.z"], at="mean")
    for i, text in enumerate(TEXTS):
        acts = subject.read([text], "embed", "layer.1.attn.z")
        torch.testing.assert_close(states["embed"][i], acts["embed"][0].mean(0), rtol=1e-4, atol=1e-5)
        expected = acts["layer.1.attn.z"][0].mean(0).flatten()
        torch.testing.assert_close(states["layer.1.attn.z"][i], expected, rtol=1e-4, atol=1e-5)
    x, mask = token_states(subject, TEXTS, "embed")
    assert mask.sum(1).tolist() == [len(subject.tokenizer(text)["input_ids"]) for text in TEXTS]
    torch.testing.assert_close(x[1, 0], subject.read([TEXTS[1]], "embed")["embed"][0, 0])


def test_causal_effect_is_the_edits_own(subject):
    site = "layer.0.resid_post"
    direction = Direction("some", site, torch.randn(subject.facts.d_model, generator=torch.Generator().manual_seed(0)))
    found = causal_effect(subject, TEXTS, lambda logits: logits[:, 5], direction, draws=4)
    plain = subject.last_logits(TEXTS)[:, 5].numpy()
    np.testing.assert_allclose(found.plain, plain, rtol=1e-5, atol=1e-6)
    up, down = (subject.last_logits(TEXTS, edits=[direction.write(s, at="last")])[:, 5].numpy() for s in (1, -1))
    np.testing.assert_allclose(found.added, up - down, rtol=1e-3, atol=1e-5)
    assert found.random_added.shape == (4, 3)
    assert 0 < found.p_value() <= 1
    assert found.removal.value == pytest.approx(np.abs(found.erased - plain).mean(), abs=1e-6)
    short = causal_effect(subject, TEXTS, lambda logits: logits[:, 5], direction, draws=4, removal=False)
    assert not len(short.erased)
    np.testing.assert_array_equal(short.added, found.added)


def test_runs_from_a_block_on_are_the_models_own(subject, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    for site in ("layer.0.resid_post", "layer.1.resid_post"):
        direction = Direction("some", site, torch.randn(subject.facts.d_model, generator=generator))
        above = use.RunsFrom(subject, subject.tokens(TEXTS), site)
        assert above.layer == int(site[6])
        for edits in ([], [direction.write(2.0, at="last")], [direction.erase(at="last")]):
            torch.testing.assert_close(
                above.last_logits(edits), subject.last_logits(TEXTS, edits=edits), rtol=1e-4, atol=1e-5
            )
    assert use.RunsFrom(subject, subject.tokens(TEXTS), "layer.0.mlp.out").layer is None

    def refuses(*_):
        raise TypeError("a block that hands on more than the stream")

    monkeypatch.setattr(use, "bypassing", refuses)
    above = use.RunsFrom(subject, subject.tokens(TEXTS), "layer.0.resid_post")
    torch.testing.assert_close(above.last_logits([]), subject.last_logits(TEXTS))


def test_contextual_calibration_takes_out_what_inputs_that_say_nothing_prefer():
    """Zhao et al.: each class's probability over its mean on content-free inputs, then the larger of the two."""
    odds, free = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, 3.0])
    p, base = odds.sigmoid(), free.sigmoid().mean()
    theirs = (p / base) / ((1 - p) / (1 - base))
    torch.testing.assert_close(contextual(odds, free), theirs.log(), rtol=1e-4, atol=1e-5)
