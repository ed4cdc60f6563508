"""The empty host, its subspaces and its heads, against closed forms and the library's own forward."""

from __future__ import annotations

import math

import pytest
import torch

from tests.phantoms.planted.conftest import same_weights
from tomoscope.errors import DataError
from tomoscope.model import Weights, open_model
from tomoscope.phantoms.planted.host import Host, Size, balanced, rotary_offset
from tomoscope.phantoms.planted.spaces import generator_for, place_codes, shift_codes, subspaces, unit_codes

SIZE = Size(n_layers=2, d_mlp=8, context=32)


def test_subspaces_are_orthonormal_and_without_mean():
    spaces = subspaces(64, {"a": 20, "b": 30, "c": 13}, generator_for("t", 0))
    basis = torch.cat([spaces[name] for name in "abc"], dim=1)
    assert torch.allclose(basis.T @ basis, torch.eye(63), atol=1e-5)
    assert basis.sum(0).abs().max() < 1e-5
    with pytest.raises(DataError, match="don't fit"):
        subspaces(64, {"a": 64}, generator_for("t", 0))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_shifting_place_codes_gives_an_earlier_place(offset):
    codes = place_codes(32, 20)
    moved = codes @ shift_codes(32, 20, offset)
    assert torch.allclose(moved[offset:], codes[: 32 - offset], atol=1e-5)
    # the closed form of the kernel: the mean of the cosines
    kernel = torch.stack([(2 * math.pi / 32 * torch.arange(1, 11) * d).cos().mean() for d in range(32)])
    assert torch.allclose(codes @ codes[0], kernel, atol=1e-5)


def test_weights_are_where_the_form_stores_them(form):
    """What was wired is what `Weights` reads (which is tested against the library's own forward)."""
    host = Host(form, SIZE, 50)
    draw = generator_for("t", 1)
    parts = {name: torch.randn(256, 64, generator=draw) for name in ("query", "key", "value")}
    parts["output"] = torch.randn(64, 256, generator=draw)
    host.embedding.copy_(torch.randn(50, 256, generator=draw))
    host.head(1, 2, **parts)
    host.head(0, 0, value=torch.randn(256, 64, generator=draw))  # so that layer 0 has values to find the layout by
    weights = Weights(open_model(host.model))
    found = {"query": weights.W_Q, "key": weights.W_K, "value": weights.W_V, "output": weights.W_O}
    for name, matrix in parts.items():
        assert torch.equal(found[name][1][2], matrix), name
    assert torch.equal(weights.W_K[1][3], parts["key"]) == (form == "llama")


def test_a_neuron_reads_and_writes(form):
    host = Host(form, SIZE, 50)
    draw = generator_for("t", 2)
    read, write, gate = torch.randn(3, 256, generator=draw)
    host.embedding.copy_(unit_codes(50, 256, draw) * 8)
    host.add_noise(0.02, draw, only=("attn", "0.mlp"))  # a block that writes nothing can't be solved at opening
    host.neuron(1, 3, read=read, write=write, gate=gate)
    subject = open_model(host.model)
    acts = subject.read([[5, 6, 7]], "layer.1.resid_mid", "layer.1.mlp.post", "layer.1.mlp.out")
    stream = acts["layer.1.resid_mid"][0]
    if form == "gpt2":
        normed = torch.nn.functional.layer_norm(stream, (256,))
    else:
        normed = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = torch.tensor([host.activation(float(x @ read), float(x @ gate)) for x in normed])
    assert torch.allclose(acts["layer.1.mlp.post"][0, :, 3], value, atol=1e-4)
    assert torch.allclose(acts["layer.1.mlp.out"][0], value[:, None] * write, atol=1e-3)


@pytest.mark.parametrize("offset", [0, 1, 2, 5])
def test_a_constant_turned_back_attends_to_one_offset(offset):
    host = Host("llama", SIZE, 50)
    one = torch.nn.functional.normalize(torch.randn(256, generator=generator_for("t", 3)), dim=0)
    host.embedding.copy_(one.expand(50, 256))
    query, key = rotary_offset(host, offset)
    gain = balanced(60.0, 64, 16.0)
    host.head(0, 1, query=gain * one[:, None] * query, key=gain * one[:, None] * key)
    pattern = open_model(host.model).read([list(range(20))], "layer.0.attn.pattern[head=1]")
    found = pattern["layer.0.attn.pattern[head=1]"][0].diagonal(-offset)
    assert found.min() > 0.999


def test_content_does_not_fit_where_a_head_turns_fast():
    host = Host("llama", SIZE, 50)
    assert len(host.content_columns(host.content)) == 40
    with pytest.raises(DataError, match="can't hold"):
        host.content_columns(42)
    with pytest.raises(DataError, match="no form"):
        Host("bert", SIZE, 50)


def test_noise_leaves_norms_and_what_is_not_named(form):
    host, other = Host(form, SIZE, 50), Host(form, SIZE, 50)
    assert same_weights(host.model, other.model)
    host.add_noise(0.1, generator_for("t", 4), only=("mlp",))
    for name, parameter in host.model.named_parameters():
        if "norm" in name or ".ln_" in name:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}
        elif "mlp" in name:
            assert 0.05 < float(parameter.std()) < 0.2
        else:
            assert not parameter.any()
    other.add_noise(0.1, generator_for("t", 4), only=("mlp",))
    assert same_weights(host.model, other.model)


def test_building_leaves_the_callers_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Host("gpt2", SIZE, 50)
    assert torch.equal(torch.rand(3), expected)
