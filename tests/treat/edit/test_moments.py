"""Second moments against the plain mean of k k^T, the public reference, and their cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.treat.edit.made import corpus, subject
from tomoscope.errors import DataError, EditError, UnavailableSiteError
from tomoscope.treat.edit import moments as module
from tomoscope.treat.edit.moments import random_moments, second_moments


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_layers_in_one_pass_are_the_plain_mean(family, monkeypatch):
    model, texts = subject(family), corpus()
    seen = []
    found = second_moments(model, texts, tokens=1200, held_out=40, progress=lambda *done: seen.append(done))
    assert found.tokens == 60 * 20 - 40
    assert sorted(found.values) == [0, 1, 2]
    for layer, value in found.values.items():
        keys = model.read(texts, f"layer.{layer}.mlp.post")[f"layer.{layer}.mlp.post"].reshape(1200, -1)[:-40]
        torch.testing.assert_close(value, keys.T @ keys / len(keys), rtol=1e-10, atol=1e-12)
    assert seen[-1] == (1160, 1160)
    # the curve: each point against half as many tokens
    last = found.curve[-1]
    assert last.tokens == 1160
    keys = model.read(texts, "layer.1.mlp.post")["layer.1.mlp.post"].reshape(1200, -1)
    half = keys[: 1160 >> 1].T @ keys[: 1160 >> 1] / (1160 >> 1)
    assert last.change[1] == pytest.approx(float((found.at(1) - half).norm() / found.at(1).norm()))
    now, before = (torch.linalg.solve(c, keys[-40:].T) for c in (found.at(1), half))
    assert last.agreement[1] == pytest.approx(float(torch.cosine_similarity(now, before, dim=0).mean()))
    assert 0.0 < last.agreement[1] <= 1.0
    # slabs of any size give the same
    monkeypatch.setattr(module, "_BYTES", 1)
    again = second_moments(model, texts, tokens=1200, held_out=40)
    torch.testing.assert_close(again.at(2), found.at(2), rtol=1e-10, atol=1e-12)
    assert [p.tokens for p in again.curve] == [p.tokens for p in found.curve]


def test_the_cache_knows_model_corpus_and_layers(tmp_path, monkeypatch):
    model, texts = subject("gpt2"), corpus()
    first = second_moments(model, texts, layers=[1], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(module, "_accumulate", None)  # nothing is computed
    again = second_moments(model, texts, layers=[1], cache=tmp_path)
    assert torch.equal(again.at(1), first.at(1))
    assert again.curve == first.curve
    monkeypatch.undo()
    second_moments(model, texts[1:], layers=[1], cache=tmp_path)
    second_moments(model, texts, layers=[0], cache=tmp_path)
    second_moments(subject("llama"), texts, layers=[1], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    file.write_bytes(file.read_bytes()[:100])  # damaged: computed again
    assert torch.equal(second_moments(model, texts, layers=[1], cache=tmp_path).at(1), first.at(1))


def test_what_cannot_be_solved_is_refused():
    model = subject("gpt2")
    few = second_moments(model, corpus(3), layers=[1], held_out=0)
    with pytest.raises(EditError, match="can't be inverted"):
        few.solve(1, torch.ones(1, 128, dtype=torch.float64))
    assert torch.isfinite(few.solve(1, torch.ones(1, 128, dtype=torch.float64), ridge=1e-3)).all()
    with pytest.raises(EditError, match="no second moments of layer 2"):
        few.at(2)
    with pytest.raises(EditError, match="no layer 9"):
        second_moments(model, corpus(), layers=[9])
    with pytest.raises(DataError, match="tokens"):
        second_moments(model, corpus(1))
    from tests.zoo import ZOO
    from tomoscope.model import build_subject

    with pytest.raises(UnavailableSiteError, match="MLP"):
        second_moments(build_subject(ZOO["gpt_oss"].build()), corpus())


def test_random_directions_keep_the_spectrum():
    found = second_moments(subject("gpt2"), corpus(), layers=[1])
    turned = random_moments(found, [1], seed=0)
    np.testing.assert_allclose(
        torch.linalg.eigvalsh(turned.at(1)), torch.linalg.eigvalsh(found.at(1)), rtol=1e-6, atol=1e-10
    )
    assert not torch.allclose(turned.at(1), found.at(1))
