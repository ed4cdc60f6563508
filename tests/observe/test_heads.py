"""Head roles: a model whose heads are set by hand, plain loops over transformers' own attentions, whole products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from tests.observe.raw import subject_of
from tests.zoo import ZOO
from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.model import open_model
from tomoscope.observe import attention_roles, copying_scores

TOKENS, PLACES = 24, 32


def eager(name):
    """A twin of a zoo model that gives its attentions; Falcon reads its config's choice, the others are switched."""
    model = ZOO[name].build()
    if name == "falcon":
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def planted():
    """A GPT-2 of two attention layers: 0.0 previous-token, 0.1 same token, 1.0 induction and copying, 1.1 nothing.

    The stream is [token, position, previous token], one-hot each, so that every pattern is known.
    """
    width, size = 2 * TOKENS + PLACES, (2 * TOKENS + PLACES) // 2
    config = transformers.GPT2Config(
        n_embd=width, n_layer=2, n_head=2, n_positions=PLACES, vocab_size=TOKENS, n_inner=4
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    token, place, before = torch.arange(TOKENS), TOKENS + torch.arange(PLACES), TOKENS + PLACES + torch.arange(TOKENS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        model.transformer.wte.weight[:, token] = torch.eye(TOKENS)
        model.transformer.wpe.weight[:, place] = torch.eye(PLACES)

        def wire(layer: int, head: int, query, key, value, out) -> None:
            attention = model.transformer.h[layer].attn
            q, k, v = (torch.arange(size) + i * width + head * size for i in range(3))
            attention.c_attn.weight[query[0], q[query[1]]] = 20.0
            attention.c_attn.weight[key[0], k[key[1]]] = 20.0
            attention.c_attn.weight[value, v[: len(value)]] = 1.0
            attention.c_proj.weight[head * size + torch.arange(len(out)), out] = 1.0

        shift = torch.arange(PLACES - 1)
        wire(0, 0, (place[1:], shift), (place[:-1], shift), token, before)
        wire(0, 1, (token, token), (token, token), token[:0], token[:0])
        wire(1, 0, (token, token), (before, token), token, token)
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())
    return open_model(model)


def test_planted_heads_have_their_roles_and_the_others_have_none(planted):
    found = attention_roles(planted, sequences=16, length=10)
    scores = {role: found[role].values.mean(-1) for role in found}
    control = {role: found[role].control.mean(-1) for role in found}
    assert scores["previous_token"][0, 0] > 0.99
    # the first token has none before it and copies itself, so one query of nine finds two keys
    assert abs(scores["induction"][1, 0] - (1 - 0.5 / 9)) < 0.01
    # the same token stands at the query itself too, so attention to it is split in two
    assert abs(scores["duplicate_token"][0, 1] - 0.5) < 0.01
    assert control["induction"][1, 0] < 0.1
    assert control["duplicate_token"][0, 1] < 0.01
    # a head without weights spreads evenly: at its uniform level, with and without repeats
    for role in found:
        assert torch.allclose(scores[role][1, 1], found[role].uniform[1], atol=1e-5)
        assert torch.allclose(control[role][1, 1], found[role].uniform[1], atol=1e-5)
    assert scores["induction"][0, 0] < 0.01
    assert found["induction"].values.shape == (2, 2, 16)


def test_planted_copying_head_has_eigenvalues_that_are_all_positive(planted):
    found = copying_scores(planted)
    assert abs(float(found.values[1, 0]) - 1) < 1e-5
    assert abs(float(found.values[0, 0])) < 1e-5
    assert found.control[1, 0].mean() < 0.5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gpt_oss", "gemma2", "falcon", "openai_gpt", "bert"])
def test_roles_are_what_loops_over_the_models_own_attentions_give(name):
    subject = subject_of(name)
    found = attention_roles(subject, sequences=5, length=7, start=4)
    model = eager(name)
    for role, scores in found.items():
        for sample, ids in enumerate(scores.sequences.tolist()):
            assert ids[0] == 4
            with torch.no_grad():
                patterns = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
            if role == "previous_token":
                wanted = [(q, q - 1) for q in range(2, 15)]
            elif role == "duplicate_token":
                wanted = [(q, q - 7) for q in range(8, 15)]
            else:
                wanted = [(q, q - 6) for q in range(8, 14)]
            if role != "previous_token":
                assert ids[1:8] == ids[8:15]
            for layer, pattern in enumerate(patterns):
                for head in range(pattern.shape[1]):
                    mean = np.mean([float(pattern[0, head, q, k]) for q, k in wanted])
                    assert abs(mean - float(scores.values[layer, head, sample])) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "gpt_neo", "gemma3", "gpt_oss", "llama", "bert"])
def test_the_uniform_level_counts_the_keys_that_each_layer_allows(name):
    subject = subject_of(name)
    found = attention_roles(subject, sequences=4, length=8)["previous_token"]
    model = eager(name)
    with torch.no_grad():
        patterns = model(input_ids=found.sequences, output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        allowed = (pattern > 0).any(1).any(0).sum(-1).float()
        assert torch.allclose(found.uniform[layer], (1 / allowed[1:]).mean()), layer


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_copying_is_the_eigenvalue_score_of_the_whole_vocabulary_product(name):
    subject = subject_of(name)
    found, model, width = copying_scores(subject, permutations=3), subject.model, subject.facts.head_dim
    embedding = model.get_input_embeddings().weight.detach().double()
    unembedding = model.get_output_embeddings().weight.detach().double().T
    unembedding = unembedding - unembedding.mean(1, keepdim=True)
    for layer in range(3):
        for head in range(4):
            part = slice(head * width, (head + 1) * width)
            if name == "gpt2":
                attention = model.transformer.h[layer].attn
                W_V = attention.c_attn.weight.detach()[:, 2 * 32 :][:, part]
                W_O = attention.c_proj.weight.detach()[part]
            else:
                attention, shared = (
                    model.model.layers[layer].self_attn,
                    slice(head // 2 * width, (head // 2 + 1) * width),
                )
                W_V, W_O = attention.v_proj.weight.detach()[shared].T, attention.o_proj.weight.detach().T[part]
            product = embedding @ W_V.double() @ W_O.double() @ unembedding
            values = np.linalg.eigvals(product.numpy())
            score = values.sum().real / np.abs(values).sum()
            assert abs(score - float(found.values[layer, head])) < 1e-4
            largest = np.sort(np.abs(values))[::-1][:width]
            ours = np.sort(found.eigenvalues[layer, head].abs().numpy())[::-1]
            assert np.allclose(largest, ours, rtol=1e-4)
    assert found.control.shape == (3, 4, 3)
    assert found.control.abs().max() <= 1


def test_scores_are_seeded_and_bad_lengths_are_refused():
    subject = subject_of("gpt2")
    first, second = attention_roles(subject, sequences=3), attention_roles(subject, sequences=3)
    assert torch.equal(first["induction"].values, second["induction"].values)
    assert torch.equal(copying_scores(subject).control, copying_scores(subject).control)
    other = attention_roles(subject, sequences=3, seed=7)
    assert not torch.equal(first["induction"].sequences, other["induction"].sequences)
    with pytest.raises(DataError, match="don't fit"):
        attention_roles(subject, length=60)
    with pytest.raises(UnavailableSiteError, match=r"attn\.pattern"):
        attention_roles(open_model(ZOO["resnet"].build()))
