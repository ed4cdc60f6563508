"""Truth without labels, on pairs whose truth is known, against autograd and one problem at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tomoscope.concepts.contrast import (
    PRESETS,
    Pairs,
    bimodality,
    ccs,
    ccs_loss,
    centring,
    crc_tpc,
    folded,
    lat,
    vinc,
)
from tomoscope.errors import DataError


def made(n=160, width=12, *, step=4.0, word=3.0, distractor=0.0, seed=0, problems=2):
    """Pairs that differ by truth along one direction, by the words yes and no along another, by a distractor."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    truth = torch.randint(0, 2, (n,), generator=g)
    other = torch.randint(0, 2, (n,), generator=g)
    sides = []
    for sign in (1, -1):
        x = torch.randn(problems, n, width, generator=g) + word * sign * basis[:, 1] + 1.0
        x = x + sign * step / 2 * (2 * truth - 1)[:, None] * basis[:, 0]
        sides.append(x + sign * distractor / 2 * (2 * other - 1)[:, None] * basis[:, 2])
    return Pairs(*sides), truth, other, basis


def accuracy(found, pairs, truth):
    return float(folded((found.score(pairs) > 0) == truth.bool()).min())


@pytest.mark.parametrize("preset", PRESETS)
def test_ccs_finds_the_truth(preset):
    pairs, truth, _, basis = made()
    train, test = pairs.take(torch.arange(80)), pairs.take(torch.arange(80, 160))
    found = ccs(train, preset=preset, restarts=4, steps=1000 if preset == "reference" else 300)
    assert accuracy(found, test, truth[80:]) > 0.9
    assert found.losses.shape == (2, 4)
    assert found.orientation == "undetermined"
    set_right = found.oriented(train.take(torch.arange(8)), truth[:8])
    assert ((set_right.score(test) > 0) == truth[80:].bool()).float().mean() > 0.9
    assert set_right.orientation == "labelled anchors"
    cosine = torch.nn.functional.cosine_similarity(set_right.raw(), basis[:, 0].expand(2, -1))
    assert cosine.min() > 0.7


def test_the_gradient_is_autograds_and_the_optimiser_torchs():
    """The released algorithm written out with torch's own layer, loss and AdamW, from the same start."""
    pairs, _, _, _ = made(40, 6, problems=1)
    mine = ccs(pairs, preset="reference", restarts=1, steps=60, seed=3)
    centred = centring(pairs, scaled=False)(pairs)
    g = torch.Generator().manual_seed(3)
    torch.randn(1, 1, 7, generator=g)
    start = (2 * torch.rand(1, 1, 7, generator=g) - 1) * 6**-0.5
    probe = nn.Linear(6, 1)
    with torch.no_grad():
        probe.weight.copy_(start[0, :, :6])
        probe.bias.copy_(start[0, 0, 6:])
    optimiser = torch.optim.AdamW(probe.parameters(), lr=0.001, weight_decay=0.01)
    for _ in range(60):
        p, q = probe(centred.yes[0]).sigmoid(), probe(centred.no[0]).sigmoid()
        loss = (p - (1 - q)).square().mean() + torch.minimum(p, q).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(mine.weight[0], probe.weight[0].detach(), rtol=1e-4, atol=1e-5)
    assert float(mine.losses[0, 0]) == pytest.approx(float(loss.detach()), abs=1e-3)


def test_all_at_once_is_as_one_at_a_time():
    pairs, _, _, _ = made(60, 6, problems=3)
    for preset in ("paper", "elk"):
        together = ccs(pairs, preset=preset, restarts=2, steps=50)
        # the starts are drawn for all problems together, so the losses of single problems are recomputed
        centred = together.centre(pairs)
        for i in range(3):
            alone = Pairs(centred.yes[i : i + 1], centred.no[i : i + 1])
            loss = ccs_loss(together.weight[i][None, None], together.bias[i][None, None], alone)
            assert float(loss) == pytest.approx(float(together.losses[i].min()), abs=1e-5)


def test_a_louder_yes_and_no_changes_nothing():
    pairs, _, _, basis = made()
    loud = Pairs(pairs.yes + 30 * basis[:, 1], pairs.no - 30 * basis[:, 1])
    for method in (crc_tpc, lat, lambda p: ccs(p, restarts=3, steps=50)):
        torch.testing.assert_close(method(pairs).score(pairs), method(loud).score(loud), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", [crc_tpc, lat])
def test_closed_forms_find_the_truth(method):
    pairs, truth, _, _ = made()
    found = method(pairs.take(torch.arange(80)))
    assert accuracy(found, pairs.take(torch.arange(80, 160)), truth[80:]) > 0.9
    # the principal component of scikit-learn's own
    from sklearn.decomposition import PCA

    if method is crc_tpc:
        centred = centring(pairs)(pairs)
        theirs = PCA(1).fit((centred.yes - centred.no)[0].double().numpy()).components_[0]
        cosine = abs(
            float(torch.nn.functional.cosine_similarity(crc_tpc(pairs).weight[0], torch.tensor(theirs).float(), dim=0))
        )
        assert cosine > 0.9999


def test_vinc_needs_and_uses_paraphrases():
    pairs, truth, _, _ = made(80, 10)
    g = torch.Generator().manual_seed(1)
    nuisance = torch.linalg.qr(torch.randn(10, 10, generator=g))[0][:, 0]
    six = []
    for _ in range(6):  # paraphrases differ by a loud nuisance, opposite on both sides
        noise = 8.0 * torch.randn(80, 1, generator=g) * nuisance
        six.append(Pairs(pairs.yes + noise, pairs.no - noise))
    all_ = Pairs(torch.cat([p.yes for p in six], 1), torch.cat([p.no for p in six], 1))
    questions, labels = torch.arange(80).repeat(6), truth.repeat(6)
    assert accuracy(vinc(all_, questions), all_, labels) > 0.8
    assert accuracy(crc_tpc(all_), all_, labels) < 0.8
    with pytest.raises(DataError, match="several templates"):
        vinc(pairs, torch.arange(80))


def test_the_most_salient_property_is_found_whatever_it_is():
    """Farquhar et al. 2023: with a louder distractor the loss is lower, and it is the distractor that is found."""
    pairs, truth, other, _ = made(distractor=12.0)
    plain, _, _, _ = made()
    found = ccs(pairs, restarts=4, steps=300)
    assert accuracy(found, pairs, truth) < 0.7
    assert accuracy(found, pairs, other) > 0.9
    assert float(found.losses.min()) < float(ccs(plain, restarts=4, steps=300).losses.min())


def test_a_constant_difference_is_kept_where_it_is_the_concept():
    """Pairs of opposed instructions: the concept is the same for all pairs, and a centred component misses it."""
    g = torch.Generator().manual_seed(0)
    concept, nuisance = torch.eye(8)[0], torch.eye(8)[1]
    base = torch.randn(1, 60, 8, generator=g)
    noise = 2.0 * torch.randn(1, 60, 1, generator=g) * nuisance
    pairs = Pairs(base + 3 * concept + noise, base - 3 * concept - noise)
    assert float(lat(pairs, centred=False).weight[0, 0]) > 0.95
    assert abs(float(crc_tpc(pairs).weight[0, 0])) < 0.3


def test_bimodality():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 4000, generator=g)
    two = torch.cat([normal[:, :2000] - 6, normal[:, 2000:] + 6], 1)
    assert float(bimodality(normal)) == pytest.approx(2 / np.pi, abs=0.03)
    assert float(bimodality(two)) > 0.95


def test_what_is_no_pair_says_so():
    with pytest.raises(DataError, match="Pairs of shapes"):
        Pairs(torch.zeros(1, 5, 3), torch.zeros(1, 4, 3))
    with pytest.raises(DataError, match="preset"):
        ccs(Pairs(torch.randn(1, 5, 3), torch.randn(1, 5, 3)), preset="new")
