"""Direct logit attribution: sums on every family, parts against a frozen norm on transformers' own modules."""

from __future__ import annotations

import pytest
import torch

from tests.observe.raw import LAYOUTS, captured, logits_alone, random_ids, random_prompts, subject_of
from tests.zoo import DECODERS, VOCAB
from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.observe import by_head, by_neuron, direct_logit_attribution

POST_NORM = ("openai_gpt",)
MIXTURES = {"qwen3_moe": (1,), "deepseek_v3": (0,), "gpt_oss": ()}  # layers with one hidden layer of neurons
SUMS = [name for name in DECODERS if name not in POST_NORM]


@pytest.mark.parametrize("name", SUMS)
def test_parts_sum_to_the_models_own_logit_difference(name):
    subject = subject_of(name)
    prompts, answers, wrong = random_prompts(6), random_ids(6), random_ids(6, seed=2)
    found = direct_logit_attribution(subject, prompts, answers, wrong)
    assert found.error < 1e-4
    assert torch.allclose(found.values.sum(0), found.total, atol=1e-4)
    assert found.softcapped == (name == "gemma2")
    assert sum(part.endswith(("attn.out", "mlp.out")) for part in found.names) == 2 * subject.facts.n_layers
    cap = getattr(subject.config, "final_logit_softcapping", None)
    for row, ids in enumerate(prompts):
        logits = logits_alone(subject.model, ids)[-1].double()
        logits = logits if cap is None else cap * torch.atanh(logits / cap)
        assert abs(float(logits[answers[row]] - logits[wrong[row]]) - float(found.total[row])) < 1e-4
    alone = direct_logit_attribution(subject, prompts, answers)
    assert alone.error < 1e-4


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_each_part_is_its_write_times_the_gradient_at_a_frozen_norm(name):
    subject, layout = subject_of(name), LAYOUTS[name]
    model, prompts, answers, wrong = subject.model, random_prompts(3), random_ids(3), random_ids(3, seed=2)
    found = direct_logit_attribution(subject, prompts, answers, wrong)
    blocks = layout.blocks(model)
    for row, ids in enumerate(prompts):
        modules = [module for block in blocks for module in (layout.attention(block), layout.mlp(block))]
        *writes, (stream, _) = captured(model, ids, [*modules, layout.norm(model)])
        direction = _frozen_gradient(model, layout, stream[-1], answers[row], wrong[row])
        for layer in range(len(blocks)):
            for offset, part in enumerate(("attn.out", "mlp.out")):
                number = float(layout.factor * writes[2 * layer + offset][1][-1] @ direction)
                got = float(found.values[found.names.index(f"layer.{layer}.{part}"), row])
                assert abs(number - got) < 1e-4, (layer, part)


def _frozen_gradient(model, layout, stream, answer, wrong):
    """d (logit difference before the cap) / d stream, the norm written out with its scale held constant."""
    norm = layout.norm(model)
    point = stream.double().requires_grad_(True)
    weight, bias = norm.weight.double(), getattr(norm, "bias", None)
    if "Gemma" in type(norm).__name__:
        weight = 1 + weight
    centred = point - point.mean() if isinstance(norm, torch.nn.LayerNorm) else point
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    scale = (centred.square().mean() + eps).rsqrt().detach()
    normed = centred * scale * weight + (0 if bias is None else bias.double())
    assert torch.allclose(normed.float(), norm(stream), atol=1e-5)
    logits = normed @ model.get_output_embeddings().weight.double().T
    logits = logits / getattr(model.config, "logits_scaling", 1.0)
    (gradient,) = torch.autograd.grad(logits[answer] - logits[wrong], point)
    return gradient.float()


@pytest.mark.parametrize("name", SUMS)
def test_heads_and_neurons_sum_to_their_branch(name):
    subject = subject_of(name)
    prompts, answers, wrong = random_prompts(4), random_ids(4), random_ids(4, seed=2)
    parts = direct_logit_attribution(subject, prompts, answers, wrong)
    heads = by_head(subject, prompts, answers, wrong)
    assert heads.layers == tuple(range(subject.facts.n_layers))
    assert heads.values.shape == (subject.facts.n_layers, subject.facts.n_heads, 4)
    assert heads.error < 1e-4
    for index, layer in enumerate(heads.layers):
        whole = parts.values[parts.names.index(f"layer.{layer}.attn.out")]
        assert torch.allclose(heads.values[index].sum(0) + heads.bias[index], whole, atol=1e-4)
    expected = MIXTURES.get(name, tuple(range(subject.facts.n_layers)))
    if not expected:
        with pytest.raises(UnavailableSiteError, match="neuron"):
            by_neuron(subject, prompts, answers, wrong)
        return
    neurons = by_neuron(subject, prompts, answers, wrong)
    assert neurons.layers == expected
    assert set(neurons.missing) == set(range(subject.facts.n_layers)) - set(expected)
    assert neurons.error < 1e-4
    for index, layer in enumerate(neurons.layers):
        whole = parts.values[parts.names.index(f"layer.{layer}.mlp.out")]
        assert torch.allclose(neurons.values[index].sum(0) + neurons.bias[index], whole, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gpt_neox", "gptj"])
def test_a_heads_number_is_its_slice_of_the_output_projection(name):
    subject, layout = subject_of(name), LAYOUTS[name]
    model, prompts, answers, wrong = subject.model, random_prompts(3), random_ids(3), random_ids(3, seed=2)
    heads = by_head(subject, prompts, answers, wrong)
    width = subject.facts.head_dim
    for row, ids in enumerate(prompts):
        projections = [layout.projection(block) for block in layout.blocks(model)]
        *zs, (stream, _) = captured(model, ids, [*projections, layout.norm(model)])
        direction = _frozen_gradient(model, layout, stream[-1], answers[row], wrong[row])
        for layer, projection in enumerate(projections):
            matrix = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
            for head in range(subject.facts.n_heads):
                part = slice(head * width, (head + 1) * width)
                number = float(layout.factor * zs[layer][0][-1, part] @ matrix[part].detach() @ direction)
                assert abs(number - float(heads.values[layer, head, row])) < 1e-4


@pytest.mark.parametrize("name", POST_NORM)
def test_a_normalised_stream_is_refused_with_the_reason(name):
    with pytest.raises(UnavailableSiteError, match="normalises its stream"):
        direct_logit_attribution(subject_of(name), random_prompts(2), random_ids(2))
    with pytest.raises(UnavailableSiteError, match="normalises its stream"):
        by_head(subject_of(name), random_prompts(2), random_ids(2))


def test_every_position_and_bad_answers():
    subject = subject_of("gpt2")
    prompts, answers = random_prompts(3), random_ids(3)
    everywhere = direct_logit_attribution(subject, prompts, answers, at=None)
    assert everywhere.error < 1e-4
    assert len(everywhere.prompt) == sum(map(len, prompts))
    last = direct_logit_attribution(subject, prompts, answers)
    ends = [
        int(((everywhere.prompt == i) & (everywhere.position == len(ids) - 1)).nonzero())
        for i, ids in enumerate(prompts)
    ]
    assert torch.allclose(everywhere.values[:, ends], last.values, atol=1e-4)
    assert "pos_embed" in last.names
    with pytest.raises(DataError, match="no prompts"):
        direct_logit_attribution(subject, [], [])
    with pytest.raises(DataError, match="outside the vocabulary"):
        by_neuron(subject, prompts, [VOCAB] * 3)
