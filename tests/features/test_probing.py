"""Probes against scikit-learn; perturbation, removal and absorption against their formulas on planted features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from tests.features.parts import coder, embedded, normal, texts, trained_coder
from tomoscope.errors import DataError
from tomoscope.features import (
    SparseCoder,
    dense_probe,
    measure_absorption,
    prompt_codes,
    sparse_probe,
    spurious_removal,
    targeted_perturbation,
)
from tomoscope.features.absorption import absorbed_shares, main_features
from tomoscope.features.logistic import WIDE, f1_score, fit_logistic
from tomoscope.features.perturbation import ablated
from tomoscope.features.probing import PromptCodes


def halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(0, n, 2), np.arange(1, n, 2)


def planted(n: int = 240, classes: int = 3, seed: int = 0, leak: float = 0.0):
    """A dictionary of unit features in 16 dimensions; feature c fires where the class is c, others at random."""
    generator = np.random.default_rng(seed)
    W = np.linalg.qr(generator.standard_normal((16, 16)))[0]
    label = generator.integers(0, classes, n)
    codes = (generator.random((n, 16)) < 0.2) * generator.uniform(0.5, 1.5, (n, 16))
    codes[:, :classes] = leak * codes[:, :classes]
    codes[np.arange(n), label] = generator.uniform(1, 2, n)
    x = codes @ W + 0.02 * generator.standard_normal((n, 16))
    W = torch.from_numpy(W).float()
    one = SparseCoder(W.T.contiguous(), W, torch.full((16,), -0.1), torch.zeros(16))
    return one, PromptCodes(csr_matrix(codes), x), label


@pytest.mark.parametrize("balanced", [False, True])
def test_the_classifier_is_scikit_learns(balanced):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 4)) * [1, 5, 0.2, 1] + 1
    y = x @ [1, -0.3, 2, 0] + generator.standard_normal(80) > 1.5
    ours = fit_logistic(x, y, balanced=balanced)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000, class_weight="balanced" if balanced else None).fit(
        x, y
    )
    np.testing.assert_allclose(ours.weight, theirs.coef_[0], atol=1e-4)
    assert ours.bias == pytest.approx(float(theirs.intercept_[0]), abs=1e-4)
    if not balanced:
        wide = fit_logistic(np.pad(x, ((0, 0), (0, WIDE))), y)  # by the other solver
        np.testing.assert_allclose(wide.weight[:4], ours.weight, atol=1e-3)
        np.testing.assert_allclose(wide.weight[4:], 0, atol=1e-6)
    separable = fit_logistic(x[:, :1], x[:, 0] > 1)
    assert ((separable.scores(x[:, :1]) > 0) == (x[:, 0] > 1)).mean() > 0.9
    with pytest.raises(DataError, match="without"):
        fit_logistic(x, np.ones(80, dtype=bool))
    assert f1_score(np.array([True, True, False]), np.array([True, False, True])) == pytest.approx(0.5)


def test_codes_of_prompts_are_means_and_places():
    subject, one, prompts = embedded(), trained_coder(), list(texts(6))
    made = prompt_codes(subject, one, prompts)
    last = prompt_codes(subject, one, prompts, at="last")
    for row, text in enumerate(prompts):
        x = subject.read(text, one.reads)[one.reads][0]
        codes = one.encode(x)
        np.testing.assert_allclose(made.codes[row].toarray()[0], codes.mean(0), atol=2e-3)
        np.testing.assert_allclose(made.x[row], x.mean(0), atol=1e-3)
        np.testing.assert_allclose(last.codes[row].toarray()[0], codes[-1], atol=5e-3)
        np.testing.assert_allclose(last.x[row], x[-1], atol=1e-3)


def test_the_planted_feature_is_chosen_and_tells():
    _, made, label = planted()
    chosen, measured = halves(240)
    found = sparse_probe(made.codes, label == 1, chosen, measured, shuffles=5)
    assert found[1].features == (1,)
    assert found[1].accuracy.value == 1.0
    assert found[1].f1 == 1.0
    assert found[1].area == 1.0
    assert found[1].chance.value < 0.75
    neurons = sparse_probe(made.x, label == 1, chosen, measured)
    assert neurons[1].accuracy.value < 1.0
    assert dense_probe(made.x, label == 1, chosen, measured).value > 0.97
    with pytest.raises(DataError, match="disjoint"):
        sparse_probe(made.codes, label == 1, chosen, chosen)


def test_mean_ablation_is_the_mean_of_ablations():
    one = coder(b_enc=torch.full((10,), -1.0))
    x = normal(12, 6)
    codes = one.encode(x)
    without = codes.clone()
    without[:, [2, 7]] = 0
    exact = one.decode(without) + (x - one.decode(codes))
    ours = ablated(
        one, csr_matrix(codes.mean(0, keepdim=True).double().numpy()), x.mean(0, keepdim=True).double().numpy(), [2, 7]
    )
    np.testing.assert_allclose(ours[0], exact.mean(0), atol=1e-5)


def test_targeted_perturbation_is_its_formula():
    one, made, label = planted(classes=3)
    names = np.array(["a", "b", "c"])[label]
    chosen, measured = halves(240)
    found = targeted_perturbation(one, made, names, chosen, measured, counts=(1, 3))
    assert {name: features[0] for name, features in found.features.items()} == {"a": 0, "b": 1, "c": 2}
    drops = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            y = label == j
            probe = fit_logistic(made.x[chosen], y[chosen], balanced=True)
            codes = made.codes.toarray()
            changed = made.x - codes[:, [i]] @ one.W_dec.double().numpy()[[i]]

            def balanced(values, y=y, probe=probe):
                right = (probe.scores(values[measured]) > 0) == y[measured]
                return (right[y[measured]].mean() + right[~y[measured]].mean()) / 2

            drops[i, j] = balanced(made.x) - balanced(changed)
    own, rest = np.diag(drops).mean(), (drops.sum() - np.trace(drops)) / 6
    assert found.score[1].value == pytest.approx(own - rest, abs=1e-9)
    assert found.intended[1] == pytest.approx(own)
    assert found.unintended[1] == pytest.approx(rest)
    assert found.score[1].value > 0.2


def test_spurious_removal_is_its_formula():
    generator = np.random.default_rng(1)
    W = np.linalg.qr(generator.standard_normal((16, 16)))[0]
    n = 400
    a, b = np.arange(n) % 2 == 0, np.arange(n) // 2 % 2 == 0
    codes = (generator.random((n, 16)) < 0.2) * generator.uniform(0.5, 1.5, (n, 16))
    codes[:, 0], codes[:, 1] = a * 1.0, b * 3.0  # the spurious feature is the louder
    x = codes @ W + 0.2 * generator.standard_normal((n, 16))
    D = torch.from_numpy(W).float()
    one = SparseCoder(D.T.contiguous(), D, torch.zeros(16), torch.zeros(16))
    made = PromptCodes(csr_matrix(codes), x)
    chosen, measured = np.arange(200), np.arange(200, 400)
    found = spurious_removal(one, made, a, b, chosen, measured, counts=(1,))
    assert found.features["spurious"][0] == 1
    agree = chosen[a[chosen] == b[chosen]]
    biased, oracle = fit_logistic(x[agree], a[agree]), fit_logistic(x[chosen], a[chosen])
    right = lambda probe, values: ((probe.scores(values) > 0) == a[measured]).mean()  # noqa: E731
    base, best = right(biased, x[measured]), right(oracle, x[measured])
    changed = right(biased, x[measured] - codes[measured][:, [1]] @ W[[1]])
    assert found.score[1].value == pytest.approx((changed - base) / (best - base), abs=1e-6)
    with pytest.raises(DataError, match="combinations"):
        spurious_removal(one, made, a, a, chosen, measured)


def absorbed_by_hand(one, codes, x, weight, main):
    """SAEBench's rules, one item at a time."""
    p = weight / np.linalg.norm(weight)
    W = one.W_dec.double().numpy()
    cos = W @ p / np.linalg.norm(W, axis=1)
    shares, fulls = [], []
    for f, act in zip(codes, x, strict=True):
        contribution, total = f * (W @ p), act @ p
        rest = [c for i, c in enumerate(contribution) if i not in main and cos[i] >= 0.1 and c > 0]
        top = sum(sorted(rest)[-3:])
        own = sum(contribution[i] for i in main)
        if own >= total or top / total < 0.4:
            shares.append(0.0)
        elif own <= 0:
            shares.append(1.0)
        else:
            part = min(top, total - own)
            shares.append(part / (part + own))
        best = int(np.argmax(contribution))
        fulls.append(
            all(f[i] == 0 for i in main) and cos[best] >= 0.025 and total > 0 and contribution[best] / total >= 0.4
        )
    return np.array(shares), np.array(fulls)


def test_absorbed_shares_are_saebenchs_rules():
    generator = np.random.default_rng(3)
    one = coder(8, 20)
    codes = (generator.random((200, 20)) < 0.3) * generator.uniform(0.2, 2, (200, 20))
    codes[:40, [0, 1]] = 0
    x = codes @ one.W_dec.double().numpy() + 0.1 * generator.standard_normal((200, 8))
    weight = generator.standard_normal(8)
    keep = x @ weight > 0
    codes, x = codes[keep], x[keep]
    share, full = absorbed_shares(one, csr_matrix(codes), x, weight, [0, 1])
    expected = absorbed_by_hand(one, codes, x, weight, [0, 1])
    np.testing.assert_allclose(share, expected[0], atol=1e-9)
    np.testing.assert_array_equal(full, expected[1])
    assert 0 < share.mean() < 1
    assert full.any()


def test_a_planted_absorption_is_counted():
    """Feature 0 is the class, feature 5 takes its place on a third of the items."""
    generator = np.random.default_rng(4)
    n = 600
    W = np.linalg.qr(generator.standard_normal((16, 16)))[0]
    label = generator.random(n) < 0.5
    taken = label & (generator.random(n) < 1 / 3)
    codes = (generator.random((n, 16)) < 0.1) * 0.5
    codes[:, 0], codes[:, 5] = label & ~taken, taken
    D = W.copy()
    D[5] = (W[0] + W[5]) / np.sqrt(2)
    x = codes @ D + 0.02 * generator.standard_normal((n, 16))
    dictionary = torch.from_numpy(D).float()
    one = SparseCoder(dictionary.T.contiguous(), dictionary, torch.zeros(16), torch.zeros(16))
    made = PromptCodes(csr_matrix(codes.astype(float)), x)
    names = np.where(label, "yes", "no")
    features, scores = main_features(made.codes, label)
    assert features[0] == 0
    assert len(scores) == len(features)
    found = measure_absorption(one, made, names, *halves(n), most=1)
    yes = next(one for one in found.classes if one.name == "yes")
    assert yes.features == (0,)
    measured = halves(n)[1]
    assert yes.full.value == pytest.approx(taken[measured].sum() / label[measured].sum(), abs=0.05)
    split = measure_absorption(one, made, names, *halves(n))
    assert next(c for c in split.classes if c.name == "yes").features == (0, 5)
