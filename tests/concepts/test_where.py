"""The grid finds the planted cell, and not in noise; removal and addition choose a direction that does both."""

from __future__ import annotations

import numpy as np
import pytest

from tomoscope.concepts import collect, select_direction, sweep
from tomoscope.concepts.where import removal
from tomoscope.data.tasks import agreement, single_tokens
from tomoscope.data.tasks.words import NOUNS
from tomoscope.errors import DataError
from tomoscope.phantoms.trained import micro_world


@pytest.fixture(scope="module")
def number():
    """Texts that end in a subject's noun, of either number; the verb comes next."""
    subject = micro_world().subject
    frames = [frame for frame in agreement.TEMPLATES["preposition"] if "{subject}" in frame][:3]
    texts, labels, words = [], [], []
    for noun in NOUNS[:24]:
        for plural in (0, 1):
            texts.append(frames[len(texts) % len(frames)].format(subject=noun[plural], attractor=NOUNS[30][0]))
            labels.append(plural)
            words.append(noun[0])
    ids = single_tokens(subject.tokenizer, ["is", "are"])
    return subject, texts, np.array(labels), words, lambda logits: logits[:, ids["are"]] - logits[:, ids["is"]]


def test_the_grid_reads_and_writes(number):
    subject, texts, labels, words, metric = number
    found = sweep(
        subject, texts, labels, sites=["layer.2.resid_post", "layer.4.resid_post"], positions=(-2, -1), metric=metric,
        clusters=words, draws=2, nulls=49,
    )  # fmt: skip
    assert found.areas.shape == (2, 2)
    assert found.written.shape == (2, 2, len(found.clusters))
    assert found.areas[1, 1] > 0.95
    assert found.p_value("layer.4.resid_post", -1) == 0.02
    effect = found.effect("layer.4.resid_post", -1)
    assert effect.low > found.random[1, 1].max()
    # a written step is the edit's own
    direction, i = (
        found.directions["layer.4.resid_post", -1],
        int(np.flatnonzero(found.clusters == found.clusters[0])[0]),
    )
    held = [text for text, word in zip(texts, words, strict=True)
            if list(dict.fromkeys(words)).index(word) == found.clusters[i]]  # fmt: skip
    up, down = (metric(subject.last_logits(held, edits=[direction.write(s, at=-1)])) for s in (1, -1))
    np.testing.assert_allclose(np.sort(found.written[1, 1][found.clusters == found.clusters[i]]),
                               np.sort((up - down).numpy()), rtol=1e-2, atol=1e-2)  # fmt: skip
    assert sweep(subject, texts, labels, sites="layer.4.resid_post", nulls=9).effect("layer.4.resid_post", -1).missing
    with pytest.raises(DataError, match="two classes"):
        sweep(subject, texts, np.zeros(len(texts), dtype=int))


def test_shuffled_labels_are_not_found(number):
    subject, texts, labels, _, _ = number
    shuffled = np.random.default_rng(0).permutation(labels)
    found = sweep(subject, texts, shuffled, sites="layer.*.resid_post", positions=(-2, -1), nulls=49)
    assert min(found.p_value(site, at) for site in found.sites for at in found.positions) > 0.02


def test_the_chosen_direction_takes_away_and_brings_about(number):
    subject, texts, labels, _, metric = number
    plural, singular = ([t for t, y in zip(texts, labels, strict=True) if y == k] for k in (1, 0))
    found = select_direction(
        subject, plural, singular, metric, ["Mary lives in", "The capital of the country is"], most_divergence=2.0,
        last_layers=0.0,
    )  # fmt: skip
    assert found.lost.low > 0
    assert found.induced.low > 0
    kept = [one for one in found.candidates if one.kept]
    assert min(one.ablated for one in kept) == next(
        one.ablated for one in kept if (one.site, one.position) == (found.direction.site, found.direction.at)
    )
    unit = found.direction.unit
    gone = collect(subject, texts[:4], "layer.*.resid_pre", edits=removal(subject, unit))
    assert max(float((value @ unit).abs().max()) for value in gone.by_site.values()) < 1e-3
    with pytest.raises(DataError, match="eight"):
        select_direction(subject, plural[:3], singular, metric, texts[:1])
    with pytest.raises(DataError, match="spares neutral"):
        select_direction(subject, plural, singular, metric, texts[:2], most_divergence=0.0)
