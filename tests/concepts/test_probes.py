"""Probes on activations whose concept is known: found where it is, not found where it is not, at honest p-values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tests.concepts.made import planted
from tomoscope.concepts import States, load_direction, train_probes
from tomoscope.concepts.splits import control_labels, folds_of, null_labels, split
from tomoscope.errors import DataError


def layered(n: int = 240, seed: int = 0) -> tuple[States, np.ndarray, torch.Tensor]:
    x, y, concept = planted(n, loud=2.0, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = {f"layer.{i}.resid_post": torch.randn(n, 16, generator=generator) for i in (0, 1)}
    return States(noise | {"layer.2.resid_post": x}), y, concept


@pytest.mark.parametrize("method", ["logistic", "ridge", "means", "discriminant"])
def test_found_where_it_is(method):
    states, y, concept = layered()
    probes = train_probes(states, y, method=method, nulls=19)
    assert probes.best == "layer.2.resid_post"
    accuracy = probes.accuracy()
    assert accuracy.low > 0.75
    assert accuracy.n == len(probes.test)
    assert probes.p_value(permutations=999) == 0.001
    assert max(probes.null_best()) < accuracy.value
    assert 0.3 < probes.accuracy("layer.0.resid_post").value < 0.7
    assert probes.p_value("layer.0.resid_post", permutations=999) > 0.05
    assert probes.roc_area().value > 0.9
    direction = probes.directions[probes.best]
    if method != "means":
        assert direction.cosine(concept) > 0.85
    torch.testing.assert_close(
        direction.score(states[probes.best][probes.test]), probes.scores[2, :, 0], rtol=1e-3, atol=1e-3
    )


def test_the_same_accuracy_as_scikit_learn():
    states, y, _ = layered()
    probes = train_probes(states, y, strengths=[1e-2], nulls=0)
    for i, (site, value) in enumerate(states.items()):
        x = value.double().numpy()
        scale = StandardScaler().fit(x[probes.train])
        theirs = LogisticRegression(C=1 / (1e-2 * len(probes.train)), tol=1e-8, max_iter=5000)
        theirs.fit(scale.transform(x[probes.train]), y[probes.train])
        said = theirs.decision_function(scale.transform(x[probes.test]))
        np.testing.assert_allclose(probes.scores[i, :, 0], said, atol=5e-2)
        hits = theirs.predict(scale.transform(x[probes.test])) == y[probes.test]
        assert probes.accuracy(site).value == pytest.approx(hits.mean(), abs=0.01)


def test_classes_and_numbers():
    x, y, _ = planted(300, classes=3, step=4.0)
    many = train_probes(States({"embed": x}), y, 3, nulls=3)
    assert many.accuracy().low > 0.8
    assert not many.directions
    assert many.roc_area(positive=2).value > 0.9
    x, y, concept = planted(300)
    numbers = train_probes(States({"embed": x}), (x @ concept).numpy(), 0, nulls=3)
    assert numbers.accuracy().value > 0.95
    assert numbers.method == "ridge"
    assert numbers.roc_area().missing


def test_noise_is_not_found():
    """24 layers of noise: the best of them looks better than chance, and the p-value says that it is not."""
    generator = torch.Generator().manual_seed(3)
    found, best = 0, []
    for seed in range(20):
        states = States({f"layer.{i}.resid_post": torch.randn(120, 8, generator=generator) for i in range(24)})
        y = np.random.default_rng(seed).permutation(np.arange(120) % 2)
        probes = train_probes(states, y, method="means", nulls=0, seed=seed)
        value = max(probes.right.mean(1))
        best.append(value)
        top = probes.sites[int(probes.right.mean(1).argmax())]
        found += probes.p_value(top, permutations=199) < 0.05
    assert np.mean(best) > 0.56
    assert found <= 3


def test_sources_stay_on_one_side():
    clusters = [f"source {i // 3}" for i in range(90)]
    train, test = split(clusters, share=0.4, seed=0)
    assert not {clusters[i] for i in train} & {clusters[i] for i in test}
    assert len(train) + len(test) == 90
    assert abs(len(test) - 36) <= 6
    fold = folds_of(clusters, 5, seed=0)
    assert all(len(set(fold[i : i + 3])) == 1 for i in range(0, 90, 3))
    with pytest.raises(DataError, match="can't be cut"):
        folds_of(["a", "b"], 5, seed=0)


def test_labels_that_mean_nothing_keep_what_sources_look_like():
    pairs = np.array([0, 1] * 20)
    drawn = null_labels(pairs, np.arange(40) // 2, n=50, seed=0)
    assert (drawn.reshape(50, 20, 2).sum(2) == 1).all()
    assert 0.4 < drawn.mean(0).mean() < 0.6
    assert (drawn != pairs).any(1).all()
    constant = np.repeat(np.arange(20) % 2, 3)
    drawn = null_labels(constant, np.arange(60) // 3, n=50, seed=0)
    assert (drawn.reshape(50, 20, 3).std(2) == 0).all()
    assert (drawn.sum(1) == constant.sum()).all()
    control = control_labels(["a", "b", "a", "c"], np.array([0, 1, 1, 1]), n=30, seed=0)
    assert (control[:, 0] == control[:, 2]).all()
    assert control.std() > 0


def test_a_source_that_tells_the_label_is_no_concept():
    """Each source has its own code and one label: probes that know sources do not do better on others."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(40, 32, generator=generator)
    clusters = np.repeat(np.arange(40), 6)
    x = codes[clusters] + 0.1 * torch.randn(240, 32, generator=generator)
    probes = train_probes(States({"embed": x}), clusters % 2, clusters=clusters, nulls=5)
    assert probes.p_value(permutations=199) > 0.05
    assert probes.accuracy().n == 20


def test_a_direction_is_kept_in_a_file(tmp_path):
    states, y, _ = layered()
    direction = train_probes(states, y, concept="sign", nulls=5, fitted_on="made").directions["layer.2.resid_post"]
    again = load_direction(direction.save(tmp_path / "sign.safetensors"))
    torch.testing.assert_close(again.vector, direction.vector)
    assert again.null == direction.null
    assert (again.concept, again.site, again.n, again.method) == ("sign", direction.site, 120, "logistic probe")
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(DataError, match="no direction"):
        load_direction(tmp_path / "other")


def test_labels_that_do_not_fit():
    states, y, _ = layered()
    with pytest.raises(DataError, match="labels for"):
        train_probes(states, y[:-1])
    with pytest.raises(DataError, match="classes"):
        train_probes(states, y + 1)
