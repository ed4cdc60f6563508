"""The exam of labels: confirmed where labels are true by construction, not measured where nothing can be named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.features.parts import embedded
from tomoscope.exams.exam import Context, examine
from tomoscope.exams.feature_labels import LABELS, _sort_of
from tomoscope.exams.world_words import world_lexicon
from tomoscope.features import JumpReLU, SparseCoder, export_coder

SITE = "layer.0.resid_pre"
SMALL = {"texts": 250, "length": 40, "features": 8, "site": SITE}


def sort_coder(sorts: list[str]) -> SparseCoder:
    """At the embedding, one feature a sort: it fires on every token that is one of the sort's words."""
    subject, lexicon = embedded(), world_lexicon()
    E = subject.model.get_input_embeddings().weight.detach()
    d, weights, levels = E.shape[1], [], []
    for sort in sorts:
        ids = [subject.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in sorted(lexicon[sort])]
        inside = torch.tensor([row[0] for row in ids if len(row) == 1])
        y = torch.zeros(len(E))
        y[inside] = 1
        # a linear map that is 1 on the sort's tokens and 0 on others, as nearly as the width allows
        w = torch.linalg.solve((E.T * (1 + 40 * y)) @ E + 1e-4 * torch.eye(d), (E.T * (1 + 40 * y)) @ y)
        weights.append(w)
        levels.append(torch.quantile(E[inside] @ w, 0.1))
    W = torch.stack(weights, -1)
    return SparseCoder(
        W, W.T.contiguous(), torch.zeros(len(sorts)), torch.zeros(d), JumpReLU(torch.stack(levels)), reads=SITE
    )


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    sorts = ["city", "country", "company", "instrument", "profession", "surname"]
    folder = export_coder(sort_coder(sorts), tmp_path_factory.mktemp("sorts"), "gemma_scope")
    context = Context(embedded(), LABELS, options=LABELS.configure({**SMALL, "coder": str(folder)}))
    return {finding.id.split("/")[1]: finding for finding in LABELS.run(context)}


def test_sorts_that_were_planted_are_named_and_true(findings):
    labels, sorts = findings["labels"], findings["sorts"]
    assert labels.verdict == "confirmed", labels.reason
    assert labels.estimate.low > labels.controls[0].estimate.value + 0.1
    assert sorts.verdict in ("confirmed", "inconclusive"), sorts.reason
    assert sorts.estimate.value > 0.5
    assert sorts.estimate.value > 3 * sorts.controls[0].estimate.value


def test_a_model_that_is_not_of_the_world_has_no_sorts():
    from tests.exams.world import random_subject

    found = {
        f.id.split("/")[1]: f for f in examine(LABELS, random_subject("gpt2", 0), options={"texts": 8, "length": 8})
    }
    assert found["sorts"].verdict == "not measured"
    assert all(len(finding.reason) > 10 for finding in found.values())


def test_sorts_are_read_from_labels():
    lexicon = world_lexicon()
    assert _sort_of('in a city, or the token "x"', lexicon) == "city"
    assert _sort_of('the token "x", or in a city', lexicon) == ""
    assert _sort_of("in a muddle", lexicon) == ""
    assert {"Paris", "Lyon"} <= lexicon["city"]
    assert np.mean([len(words) > 5 for words in lexicon.values()]) == 1.0
