"""Token attributions against captum and against autograd on transformers' own inputs_embeds."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients

from tests.observe.raw import logits_alone, random_ids, random_prompts, subject_of
from tomoscope.errors import DataError
from tomoscope.observe import gradient, gradient_x_input, integrated_gradients

FAMILIES = ["gpt2", "llama", "gemma2", "granite", "bloom", "openai_gpt"]


def _forward(model, answer, wrong):
    def forward(ids):
        logits = model(input_ids=ids).logits[:, -1]
        return logits[:, answer] - logits[:, wrong]

    return forward


def _at_embeddings(model, answer, wrong):
    def forward(embeddings):
        logits = model(inputs_embeds=embeddings).logits[:, -1]
        return logits[:, answer] - logits[:, wrong]

    return forward


def _embedded(model, ids):
    return model.get_input_embeddings()(torch.tensor([ids])).detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_autograds_own_on_inputs_embeds(name):
    subject = subject_of(name)
    prompts, answers, wrong = random_prompts(4), random_ids(4), random_ids(4, seed=2)
    length, product = gradient(subject, prompts, answers, wrong), gradient_x_input(subject, prompts, answers, wrong)
    factor = {"granite": 3.0}.get(name, 1.0)
    for row, ids in enumerate(prompts):
        embeddings = _embedded(subject.model, ids).requires_grad_(True)
        metric = _at_embeddings(subject.model, answers[row], wrong[row])(embeddings)
        (slope,) = torch.autograd.grad(metric.sum(), embeddings)
        count = len(ids)
        assert torch.allclose(product.values[row, :count], (slope * embeddings)[0].sum(-1).detach(), atol=1e-5)
        own = slope[0].norm(dim=-1)
        ratio = length.values[row, :count] / own
        # the site may be after the family's embedding multiplier, which scales the gradient by a constant
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
        if name in ("gpt2", "llama", "bloom", "openai_gpt"):
            assert torch.allclose(ratio[0] * factor, torch.tensor(1.0), rtol=1e-4)
        assert torch.allclose(length.metric[row], metric[0], atol=1e-5)
        assert length.tokens[row, :count].tolist() == ids
        assert not length.mask[row, count:].any()
        assert (length.values[row, count:] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_integrated_gradients_are_captums(name):
    subject = subject_of(name)
    prompts, answers, wrong = random_prompts(3), random_ids(3), random_ids(3, seed=2)
    found = integrated_gradients(subject, prompts, answers, wrong, steps=40, rows=17, baseline="zero")
    layered = integrated_gradients(subject, prompts, answers, wrong, steps=40, baseline="pad")
    for row, ids in enumerate(prompts):
        embeddings = _embedded(subject.model, ids)
        captums = IntegratedGradients(_at_embeddings(subject.model, answers[row], wrong[row]))
        theirs = captums.attribute(embeddings, torch.zeros_like(embeddings), n_steps=40, method="gausslegendre")
        assert torch.allclose(found.values[row, : len(ids)], theirs[0].sum(-1).float(), atol=1e-4)
        by_layer = LayerIntegratedGradients(
            _forward(subject.model, answers[row], wrong[row]), subject.model.get_input_embeddings()
        )
        theirs = by_layer.attribute(
            torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long), n_steps=40, method="gausslegendre"
        )
        assert torch.allclose(layered.values[row, : len(ids)], theirs[0].sum(-1).float().detach(), atol=1e-4)


@pytest.mark.parametrize("baseline", ["zero", "pad", "mean"])
def test_the_completeness_error_is_what_it_says_and_falls_with_steps(baseline):
    subject = subject_of("gpt2")
    prompts, answers = random_prompts(3), random_ids(3)
    errors = []
    for steps in (2, 64):
        found = integrated_gradients(subject, prompts, answers, baseline=baseline, steps=steps)
        gap = (found.values.sum(1) - (found.metric - found.baseline_metric)).abs()
        assert torch.allclose(found.completeness_error, gap, atol=1e-5)
        errors.append(float(found.completeness_error.max()))
    assert errors[1] < 1e-3 < errors[0]
    for row, ids in enumerate(prompts):
        assert torch.allclose(found.metric[row], logits_alone(subject.model, ids)[-1, answers[row]], atol=1e-5)
        table = subject.model.get_input_embeddings().weight.detach()
        start = {"zero": table[0] * 0, "pad": table[0], "mean": table.mean(0)}[baseline].expand(1, len(ids), -1)
        with torch.no_grad():
            metric = subject.model(inputs_embeds=start.contiguous()).logits[0, -1, answers[row]]
        assert torch.allclose(found.baseline_metric[row], metric, atol=1e-5)


def test_a_zero_embedding_before_an_rms_norm_is_reported_as_incomplete():
    subject = subject_of("llama")
    prompts, answers = random_prompts(3), random_ids(3)
    assert integrated_gradients(subject, prompts, answers, baseline="zero").completeness_error.max() > 0.1
    assert integrated_gradients(subject, prompts, answers).completeness_error.max() < 0.02


def test_a_masked_language_model_is_explained_at_its_mask():
    subject = subject_of("bert")
    prompts, answers = [[5, 6, 2, 7, 8], [9, 2, 10]], [11, 12]
    for at in (2, 1):
        found = integrated_gradients(subject, prompts, answers, at=at, steps=64)
        for row, ids in enumerate(prompts):
            assert torch.allclose(found.metric[row], logits_alone(subject.model, ids)[at, answers[row]], atol=1e-5)
        assert found.completeness_error.max() < 0.02


def test_bad_arguments_are_refused():
    subject = subject_of("gpt2")
    with pytest.raises(DataError, match="unknown"):
        integrated_gradients(subject, [[5, 6]], [7], baseline="noise")
    with pytest.raises(DataError, match="at least one step"):
        integrated_gradients(subject, [[5, 6]], [7], steps=0)
    with pytest.raises(DataError, match="no prompts"):
        gradient(subject, [], [])
    with pytest.raises(DataError, match="2 wrong answers for 1 prompts"):
        gradient_x_input(subject, [[5, 6]], [7], [8, 9])
