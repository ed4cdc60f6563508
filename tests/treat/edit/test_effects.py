"""Scores by hand: losses from the library's own forward, successes, exact matches, entropies, missing ones left out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.treat.edit.made import CONTEXTS, FACTS, corpus, subject
from tomoscope.errors import DataError
from tomoscope.treat.edit.effects import compare, measure, ngram_entropy, relative_norms, text_losses, tfidf_cosine
from tomoscope.treat.edit.memit import memit
from tomoscope.treat.edit.moments import second_moments
from tomoscope.treat.edit.requests import Probe

ASKED = tuple(
    dataclasses.replace(
        one, target_true="Paul", paraphrases=(f"{one.subject} likes", f"With {one.subject} goes"),
        neighbours=(Probe("Anna plays with", "Paul", one.target_new),), generation=(f"{one.subject} is",),
    )
    for one in FACTS
)  # fmt: skip


def loss(model, prompt, answer):
    ids, target = model.tokenizer(prompt)["input_ids"], model.tokenizer(f" {answer}")["input_ids"]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
    said = logits.float().log_softmax(-1)
    exact = logits.argmax(-1).tolist() == target
    return -float(said[range(len(target)), target].mean()), exact


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_by_hand(family):
    model = subject(family)
    found = measure(model, ASKED, texts=["Mary gives a book to John", "Tom is here"])
    assert set(found.answers) == {"efficacy", "paraphrase", "neighbourhood"}
    efficacy, paraphrase = found.answers["efficacy"], found.answers["paraphrase"]
    for place, one in enumerate(ASKED):
        right, exact = loss(model, one.text, one.target_new)
        wrong, _ = loss(model, one.text, "Paul")
        assert efficacy.right[place] == pytest.approx(right, rel=1e-4)
        assert efficacy.wrong[place] == pytest.approx(wrong, rel=1e-4)
        assert efficacy.exact[place] == exact
        assert efficacy.success[place] == (wrong > right)
        assert efficacy.magnitude[place] == pytest.approx(np.exp(-right) - np.exp(-wrong), rel=1e-3, abs=1e-9)
        for k, text in enumerate(one.paraphrases):
            assert paraphrase.right[2 * place + k] == pytest.approx(loss(model, text, one.target_new)[0], rel=1e-4)
    expected = [(paraphrase.success[2 * i : 2 * i + 2]).mean() for i in range(3)]
    np.testing.assert_allclose(found.per_fact("paraphrase"), expected)
    assert np.isnan(found.per_fact("reasoning")).all()
    ids = torch.tensor([model.tokenizer("Tom is here")["input_ids"]])
    with torch.no_grad():
        assert text_losses(model, ["Tom is here"])[0] == pytest.approx(
            float(model.model(ids, labels=ids).loss), rel=1e-4
        )


def test_before_and_after():
    model = subject("gpt2")
    texts = ["Mary gives a book to John", "Tom is here"]

    def behaviour(some):
        return some.last_logits(["Tom is", "Mary is"])[:, 7].numpy()

    asked = {"texts": texts, "continue_tokens": 6, "behaviours": {"seventh": behaviour}}
    references = {"John": ["John is here", "John goes"]}
    before = measure(model, ASKED, references=references, **asked)
    same = {
        score.name: score for score in compare(before, measure(model, ASKED, references=references, **asked), seed=0)
    }
    for score in same.values():
        assert score.protocol
        if score.change is not None:
            assert score.change.value == 0.0
    assert same["essence drift"].estimate.value == pytest.approx(0.0, abs=1e-9)
    assert "reasoning" not in same
    moments = second_moments(model, corpus(), layers=[1])
    made = memit(model, ASKED, moments, layers=[1], weight=0.1, contexts=CONTEXTS)
    with made.treatment.applied(model):
        after = measure(model, ASKED, references=references, **asked)
    scores = {score.name: score for score in compare(before, after, seed=0)}
    assert scores["essence drift"].estimate.value > 0
    assert scores["seventh"].change.value == pytest.approx(
        (after.behaviours["seventh"] - before.behaviours["seventh"]).mean()
    )
    parts = [after.per_fact(kind).mean() for kind in ("efficacy", "paraphrase", "neighbourhood")]
    expected = 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0
    assert scores["harmonic"].estimate.value == pytest.approx(expected)
    assert scores["reference score"].estimate.n == 1  # one answer has texts to compare with
    norms = relative_norms(model, made.treatment.norms())
    (name,) = norms
    weight = model.model.get_parameter(name)
    assert norms[name] == pytest.approx(float(made.treatment.changes[name].dense().norm() / weight.detach().norm()))
    with pytest.raises(DataError, match="nothing to measure"):
        measure(model, [])


def test_texts_by_hand():
    # a b a b: bigrams ab x2, ba; trigrams aba, bab
    two = -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * two + 4 / 3 * 1.0) / 2)
    assert ngram_entropy("a") == 0.0
    assert tfidf_cosine("one two", "one two") == pytest.approx(1.0)
    assert tfidf_cosine("one two", "three four") == 0.0
    assert tfidf_cosine("!", "?") == 0.0
