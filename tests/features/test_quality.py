"""Every measure against its formula written out on dense codes, and the baselines against theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.features.parts import coder, embedded, normal, texts, trained_coder
from tomoscope.errors import DataError
from tomoscope.features import (
    ReLU,
    SparseCoder,
    TopK,
    measure_activations,
    measure_baselines,
    measure_coder,
    neuron_coder,
    pca_coder,
    random_coder,
)
from tomoscope.features.baselines import fitted_scale, moments
from tomoscope.features.samples import decoded, samples

SITE = "layer.3.resid_post"


def test_measures_of_activations_are_their_formulas():
    one, x = coder(b_enc=torch.full((10,), -1.0)), normal(60, 6) + 3.0
    x[:, 2] *= 4
    prompt = torch.arange(60) // 5
    pieces = [(x[i : i + 7], x[i : i + 7], prompt[i : i + 7]) for i in range(0, 60, 7)]
    found = measure_activations(one, pieces)
    codes = one.encode(x)
    made = one.decode(codes)
    error = (x - made).square().sum(-1)
    expected = {
        "explained_variance": 1 - error.sum() / (x - x.mean(0)).square().sum(),
        "explained_variance_legacy": torch.cat(
            [
                1 - error[i : i + 7] / (p - p.mean(0)).square().sum(-1)
                for i, (p, _, _) in zip(range(0, 60, 7), pieces, strict=True)
            ]
        ).mean(),
        "l0": (codes > 0).sum(-1).float().mean(),
        "l1": codes.sum(-1).mean(),
        "mse": (x - made).square().mean(),
        "cosine": functional.cosine_similarity(x, made).mean(),
        "l2_ratio": (made.norm(dim=-1) / x.norm(dim=-1)).mean(),
        "reconstruction_bias": made.square().sum(-1).mean() / (x * made).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(float(value), rel=1e-4), name
        assert found[name].low < found[name].value < found[name].high
        assert found[name].n == 12
    np.testing.assert_array_equal(found.fires, (codes > 0).sum(0).numpy())
    np.testing.assert_array_equal(found.dead, np.flatnonzero(found.fires == 0))
    assert found["dense"].value == pytest.approx(float((found.density > 0.1).mean()))
    counts, edges = found.density_histogram()
    assert counts.sum() == (found.fires > 0).sum()
    assert edges[-1] == 0


def test_a_large_mean_does_not_spoil_the_variance():
    x = normal(200, 6) * 0.01 + 500.0
    exact = pca_coder(*moments([x]), k=6)
    found = measure_activations(exact, [(x, x, torch.arange(200))])
    assert found["explained_variance"].value == pytest.approx(1.0, abs=0.01)


def test_codes_are_decoded_without_the_dense_ones():
    x = normal(9, 6)
    skip = coder(W_skip=normal(6, 6), activation=TopK(3))
    torch.testing.assert_close(decoded(skip, skip.sparse(x), x), skip(x))
    never = coder(b_enc=torch.full((10,), -1e9))
    torch.testing.assert_close(decoded(never, never.sparse(x)), never.b_dec.expand(9, -1))
    with pytest.raises(DataError, match="skip path"):
        decoded(skip, skip.sparse(x))


def test_samples_are_what_is_read_with_their_places():
    subject, prompts = embedded(), list(texts(7))
    found = list(samples(subject, iter(prompts), SITE, skip_first=True, batch_size=3))
    whole = {
        (p, t): v
        for piece in found
        for p, t, v in zip(piece.prompt.tolist(), piece.position.tolist(), piece.values[SITE], strict=True)
    }
    for row, text in enumerate(prompts):
        ids = subject.tokenizer(text)["input_ids"]
        own = subject.read(text, SITE)[SITE][0]
        assert (row, 0) not in whole
        for place in range(1, len(ids)):
            torch.testing.assert_close(whole[row, place], own[place], atol=2e-4, rtol=1e-3)
    tokens = [t for piece in found for t in piece.token.tolist()]
    assert tokens == [t for text in prompts for t in subject.tokenizer(text)["input_ids"][1:]]


def test_cross_entropy_and_divergence_are_the_models_own():
    subject, one, prompts = embedded(), trained_coder(), list(texts(10))
    found = measure_coder(subject, one, prompts, batch_size=4)

    def with_hook(change):
        sums = torch.zeros(2, dtype=torch.float64)
        for text in prompts:
            ids = subject.tokenizer(text, return_tensors="pt")["input_ids"]
            block = subject.model.model.layers[3]

            def hook(module, inputs, output):
                if isinstance(output, tuple):
                    return (change(output[0]), *output[1:])
                return change(output)

            with torch.no_grad():
                clean = subject.model(ids).logits[0, :-1].log_softmax(-1)
                handle = block.register_forward_hook(hook)
                logits = subject.model(ids).logits[0, :-1].log_softmax(-1)
                handle.remove()
            sums[0] += functional.nll_loss(logits, ids[0, 1:], reduction="sum").double()
            sums[1] += functional.kl_div(logits, clean, log_target=True, reduction="sum").double()
        return sums / sum(len(subject.tokenizer(text)["input_ids"]) - 1 for text in prompts)

    mean = torch.from_numpy(found.mean).float()
    ce = {
        "clean": with_hook(lambda x: x)[0],
        "spliced": with_hook(lambda x: one(x))[0],
        "zero": with_hook(torch.zeros_like)[0],
        "mean": with_hook(lambda x: mean.expand_as(x))[0],
    }
    for name, value in ce.items():
        assert found[f"ce_{name}"].value == pytest.approx(float(value), rel=1e-4), name
    assert found["kl"].value == pytest.approx(float(with_hook(lambda x: one(x))[1]), rel=1e-3)
    for name in ("zero", "mean"):
        share = (ce[name] - ce["spliced"]) / (ce[name] - ce["clean"])
        assert found[f"ce_recovered_{name}"].value == pytest.approx(float(share), rel=1e-3)
    everything = SparseCoder(
        torch.cat([torch.eye(192), -torch.eye(192)], 1), torch.cat([torch.eye(192), -torch.eye(192)]),
        torch.zeros(384), torch.zeros(192), ReLU(), reads=SITE,
    )  # fmt: skip
    whole = measure_coder(subject, everything, prompts, skip_first=True)
    assert whole["ce_recovered_mean"].value == pytest.approx(1.0, abs=1e-4)
    assert whole["kl"].value == pytest.approx(0.0, abs=1e-5)
    assert whole["explained_variance"].value == pytest.approx(1.0, abs=1e-6)


def test_baselines_have_their_closed_forms():
    x = normal(400, 8) @ normal(8, 8, seed=3) + 1.0
    mean, covariance = moments([x[:150], x[150:]])
    torch.testing.assert_close(covariance.float(), torch.cov(x.T, correction=0), atol=1e-4, rtol=1e-4)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    rows = torch.arange(400)
    found = measure_activations(pca_coder(mean, covariance, 3), [(x, x, rows)])
    assert found["explained_variance"].value == pytest.approx(float(values[:3].sum() / values.sum()), abs=1e-5)
    assert found["l0"].value == pytest.approx(3.0)
    neurons = measure_activations(neuron_coder(mean, 2), [(x, x, rows)])
    around = (x - mean.float()).square()
    assert neurons["explained_variance"].value == pytest.approx(
        float(around.topk(2, dim=-1).values.sum() / around.sum()), abs=1e-4
    )
    one = coder(8, 30)
    chance = random_coder(one, mean, 4, seed=1)
    torch.testing.assert_close(chance.W_dec.norm(dim=-1), one.W_dec.norm(dim=-1))
    scale = fitted_scale(chance, [x])
    made = lambda factor: ((chance(x) - chance.b_dec) * factor - (x - chance.b_dec)).square().sum()  # noqa: E731
    assert made(scale) <= min(made(scale * 1.01), made(scale * 0.99))


def test_a_trained_dictionary_beats_what_is_dumb():
    subject, one = embedded(), trained_coder()
    chosen, measured = list(texts(16)), list(texts(40)[16:])
    own = measure_coder(subject, one, measured, downstream=False)
    found = measure_baselines(
        subject, one, chosen, measured, k=own["l0"].value, downstream=False, untrained=(subject, coder(192, 256))
    )
    assert set(found) == {"random", "pca", "neurons", "untrained"}
    assert own["explained_variance"].low > found["random"]["explained_variance"].high
    assert own["explained_variance"].low > found["neurons"]["explained_variance"].high
    assert abs(found["random"]["l0"].value - own["l0"].value) < 1
    assert own.document()["measures"]["l0"]["value"] == own["l0"].value


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="does not say which site"):
        measure_coder(embedded(), coder(), ["a"])
    with pytest.raises(DataError, match="192 wide"):
        measure_coder(embedded(), coder(), ["a b"], reads=SITE)
    with pytest.raises(DataError, match="autoencoders"):
        measure_baselines(embedded(), coder(reads="layer.0.mlp.in", writes="layer.0.mlp.out"), [], [], k=3)
    with pytest.raises(DataError, match="no token"):
        measure_activations(coder(), [])
