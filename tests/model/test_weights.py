"""Weights by role, against the activations they must give and dense products."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_families import STACKS, opened, plain
from tests.zoo import ZOO
from tomoscope.errors import EditError, UnavailableSiteError
from tomoscope.model import Weights

FUSED_OR_NOT = [name for name in STACKS if name not in ("deepseek_v3",) and ZOO[name].kind != "vision"]


@pytest.mark.parametrize("name", FUSED_OR_NOT)
def test_values_and_results_are_products_with_the_weights(name: str) -> None:
    subject = opened(name)
    weights = Weights(subject)
    inputs = ZOO[name].inputs(seed=11)
    acts = subject.read(inputs, "layer.1.attn.v", "layer.1.attn.z", "layer.1.attn.result")
    torch.testing.assert_close(
        torch.einsum("bthi,hio->btho", acts["layer.1.attn.z"], weights.W_O[1]),
        acts["layer.1.attn.result"],
        rtol=1e-4,
        atol=1e-5,
    )
    value = acts["layer.1.attn.v"]
    source = next(
        path
        for path, module in subject.model.named_modules()
        if path.startswith(subject.structure.blocks[1].attention + ".")
        and path.rsplit(".", 1)[-1] in ("v_proj", "value", "v_lin", "c_attn", "query_key_value", "q_proj")
    )
    given = subject.read(inputs, f"{source}.input")[f"{source}.input"]
    per_head = torch.einsum("btd,hdi->bthi", given[:, 1:] - given[:, :-1], weights.W_V[1])
    seen = value[:, 1:] - value[:, :-1]
    seen = seen.repeat_interleave(per_head.shape[2] // seen.shape[2], dim=2)
    torch.testing.assert_close(per_head, seen, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bloom", "falcon", "opt", "gemma2"])
def test_neurons_write_their_rows(name: str) -> None:
    subject = opened(name)
    weights = Weights(subject)
    inputs = ZOO[name].inputs(seed=12)
    block = subject.structure.blocks[2]
    acts = subject.read(inputs, "layer.2.mlp.post", block.down)
    bias = subject.model.get_submodule(block.down).bias
    got = acts["layer.2.mlp.post"] @ weights.W_out[2] + (0 if bias is None else bias)
    torch.testing.assert_close(got, acts[block.down].reshape(got.shape), rtol=1e-4, atol=1e-4)
    assert weights.W_in[2].shape == (32, subject.facts.d_mlp)
    assert weights.W_U.shape == (32, 96)
    assert weights.W_E.shape == (96, 32)


def test_factored_circuits_equal_dense_ones() -> None:
    weights = Weights(opened("llama"))
    ov = weights.OV(1)
    dense = ov.product()
    torch.testing.assert_close(ov.norm(), torch.linalg.matrix_norm(dense), rtol=1e-4, atol=1e-5)
    small = ov.eigenvalues().abs().sort(descending=True).values
    large = torch.linalg.eigvals(dense).abs().sort(descending=True).values[:, : small.shape[1]]
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_equals_the_dense_formula(kind: str) -> None:
    weights = Weights(opened("llama"))
    got = weights.composition(kind)
    write, qk = weights.OV(0).product()[2], weights.QK(2).product()[1]
    read = {"Q": qk, "K": qk.T, "V": weights.OV(2).product()[1]}[kind]
    expected = torch.linalg.matrix_norm(write @ read) / (
        torch.linalg.matrix_norm(write) * torch.linalg.matrix_norm(read)
    )
    assert float(got[0, 2, 2, 1]) == pytest.approx(float(expected), rel=1e-4)
    assert float(got[2, :, 0].abs().max()) == 0.0


def test_weights_are_views_and_an_edit_is_undone() -> None:
    subject = opened("gpt2")
    weights = Weights(subject)
    assert weights.W_O[0].data_ptr() == subject.model.transformer.h[0].attn.c_proj.weight.data_ptr()
    inputs = ZOO["gpt2"].inputs(seed=1)
    base = plain(subject, inputs)
    name = "transformer.h.1.mlp.c_proj.weight"
    change = torch.randn(subject.model.get_parameter(name).shape)
    with weights.edited((name, change)):
        assert not torch.allclose(plain(subject, inputs), base)
    assert torch.equal(plain(subject, inputs), base)
    with pytest.raises(EditError, match="no parameter"), weights.edited(("nowhere", change)):
        pass


def test_compressed_keys_say_why() -> None:
    with pytest.raises(UnavailableSiteError, match="compress"):
        _ = Weights(opened("deepseek_v3")).W_K[1]
