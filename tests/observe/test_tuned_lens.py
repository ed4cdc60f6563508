"""The tuned lens: its first step against autograd on transformers' own modules, its gain on new text, its files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tests.observe.raw import LAYOUTS, hidden_alone, logits_alone, random_prompts, subject_of
from tomoscope.errors import DataError, LedgerError
from tomoscope.observe import TunedLens, logit_lens, train_tuned_lens


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "granite"])
def test_the_first_step_is_autograds_gradient_of_the_mean_kl(name):
    subject, layout = subject_of(name), LAYOUTS[name]
    prompts = random_prompts(4)
    lens = train_tuned_lens(
        subject,
        prompts,
        random_prompts(2, seed=9),
        steps=1,
        batch_prompts=4,
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=0.5,
    )
    width = subject.facts.d_model
    for index, site in enumerate(lens.sites):
        A, b = torch.zeros(width, width, requires_grad=True), torch.zeros(width, requires_grad=True)
        losses = []
        for ids in prompts:
            hidden, final = hidden_alone(subject.model, ids)[index], logits_alone(subject.model, ids).log_softmax(-1)
            decoded = layout.head(subject.model, layout.norm(subject.model)(hidden + hidden @ A.T + b)).log_softmax(-1)
            losses.append(F.kl_div(decoded, final, reduction="none", log_target=True).sum(-1))
        grads = torch.autograd.grad(torch.cat(losses).mean(), [A, b])
        clip = max(1.0, float(sum(g.square().sum() for g in grads).sqrt()))
        assert torch.allclose(lens.weight[index], -0.5 * grads[0] / clip, atol=2e-6), site
        assert torch.allclose(lens.bias[index], -0.5 * grads[1] / clip, atol=2e-6), site
    assert all(parameter.grad is None for parameter in subject.model.parameters())


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_training_lowers_the_kl_on_held_out_prompts_and_untrained_is_the_plain_lens(optimiser):
    subject = subject_of("gpt2")
    train, held_out = random_prompts(64, seed=1), random_prompts(16, seed=2)
    rate = 0.03 if optimiser == "adam" else None
    lens = train_tuned_lens(subject, train, held_out, steps=40, optimiser=optimiser, learning_rate=rate)
    assert lens.training.steps == 40
    assert lens.training.held_out_tokens == sum(map(len, held_out))
    plain = logit_lens(subject, held_out, at=None)
    assert torch.allclose(torch.tensor(lens.training.plain_kl), plain.kl[:-1].mean(1), atol=1e-6)
    tuned = logit_lens(subject, held_out, at=None, lens=lens)
    assert torch.allclose(torch.tensor(lens.training.kl), tuned.kl[:-1].mean(1), atol=1e-6)
    assert torch.equal(tuned.kl[-1], plain.kl[-1])
    assert all(new < 0.9 * old for new, old in zip(lens.training.kl, lens.training.plain_kl, strict=True))


def test_the_same_data_gives_the_same_lens_and_memory_bound_changes_nothing_but_rounding():
    subject = subject_of("llama")
    train, held_out = random_prompts(12), random_prompts(4, seed=2)
    first, second = (train_tuned_lens(subject, train, held_out, steps=4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    tight = train_tuned_lens(subject, train, held_out, steps=4, chunk_bytes=40_000)
    assert torch.allclose(first.weight, tight.weight, atol=1e-5)
    once = train_tuned_lens(subject, iter(train), held_out, steps=100, batch_prompts=5)
    assert once.training.steps == 3


def test_a_lens_is_saved_and_loaded_back_whole(tmp_path):
    subject = subject_of("gpt2")
    lens = train_tuned_lens(subject, random_prompts(4), random_prompts(2, seed=5), steps=2)
    lens.save(tmp_path / "lens")
    lens.save(tmp_path / "lens")
    back = TunedLens.load(tmp_path / "lens", subject=subject)
    assert torch.equal(back.weight, lens.weight)
    assert torch.equal(back.bias, lens.bias)
    assert (back.sites, back.model, back.training) == (lens.sites, lens.model, lens.training)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lens"]
    assert json.loads((tmp_path / "lens" / "lens.json").read_text())["training"]["kl"] == list(lens.training.kl)


def test_broken_foreign_and_unwritable_files_are_refused(tmp_path):
    subject = subject_of("gpt2")
    lens = train_tuned_lens(subject, random_prompts(4), random_prompts(2, seed=5), steps=1)
    folder = lens.save(tmp_path / "lens")
    with pytest.raises(DataError, match="not for"):
        TunedLens.load(folder, subject=_narrower())
    raw = (folder / "lens.safetensors").read_bytes()
    (folder / "lens.safetensors").write_bytes(raw[:-7])
    with pytest.raises(DataError, match="altered"):
        TunedLens.load(folder)
    with pytest.raises(DataError, match="no readable tuned lens"):
        TunedLens.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="can't be written"):
        lens.save(tmp_path / "file" / "lens")
    with pytest.raises(DataError, match="held-out"):
        train_tuned_lens(subject, random_prompts(2), [])
    with pytest.raises(DataError, match="no training prompts"):
        train_tuned_lens(subject, [], random_prompts(2))
    with pytest.raises(DataError, match="unknown"):
        train_tuned_lens(subject, random_prompts(2), random_prompts(2), optimiser="lion")
    with pytest.raises(DataError, match="no translator"):
        lens.translate("layer.9.resid_post", torch.zeros(1, subject.facts.d_model))


def _narrower():
    import transformers

    from tests.zoo import randomise
    from tomoscope.model import open_model

    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=96)
    return open_model(randomise(transformers.GPT2LMHeadModel(config), 1))
