"""Written, read, the same codes; every architecture, and each trained one through its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.features.training.planted import planted
from tomoscope.activations import ArraySource
from tomoscope.errors import DataError
from tomoscope.features import JumpReLU, ReLU, SparseCoder, TopK, load_coder, save_coder
from tomoscope.features.training import TrainConfig, finished_coder, train

D, F, OUT = 6, 20, 5
DRAW = torch.Generator().manual_seed(0)
THRESHOLD = torch.rand(F, generator=DRAW)


def coder(activation: object, *, out: int = D, skip: bool = False, centred: bool = True) -> SparseCoder:
    parts = [torch.randn(*shape, generator=DRAW) for shape in ((D, F), (F, out), (F,), (out,))]
    own = out == D and not skip
    return SparseCoder(
        *parts, activation, torch.randn(out, D, generator=DRAW) if skip else None, centred=centred and own,
        reads="layer.1.mlp.in", writes="layer.1.mlp.in" if own else "layer.1.mlp.out", name="mine",
    )  # fmt: skip


CODERS = {
    "standard": coder(ReLU()),
    "topk": coder(TopK(3)),
    "jumprelu": coder(JumpReLU(THRESHOLD), centred=False),
    "transcoder": coder(ReLU(), out=OUT),
    "skip_transcoder": coder(ReLU(), out=OUT, skip=True),
    "jumprelu_transcoder": coder(JumpReLU(THRESHOLD), out=OUT),
    "jumprelu_skip_transcoder": coder(JumpReLU(THRESHOLD), out=OUT, skip=True),
    "topk_skip_transcoder": coder(TopK(4), out=OUT, skip=True),
}


@pytest.mark.parametrize("name", CODERS)
def test_what_is_read_is_what_was_written(tmp_path: Path, name: str) -> None:
    one, x = CODERS[name], torch.randn(30, D, generator=DRAW)
    save_coder(one, tmp_path, metadata={"model_name": "tiny"}, log_frequency=torch.zeros(F))
    back = load_coder(tmp_path)
    assert torch.equal(back.encode(x), one.encode(x))
    assert torch.equal(back(x), one(x))
    assert (back.reads, back.writes, back.name) == (one.reads, one.writes, "mine")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == name
    assert config["metadata"]["model_name"] == "tiny"
    assert set(load_file(tmp_path / "sparsity.safetensors")) == {"sparsity"}


def test_gated_is_a_jumprelu(tmp_path: Path) -> None:
    one, x = coder(JumpReLU(THRESHOLD)), torch.randn(200, D, generator=DRAW)
    save_coder(one, tmp_path, gated=True)
    torch.testing.assert_close(load_coder(tmp_path)(x), one(x), atol=1e-5, rtol=1e-5)
    # and by the formula of the gated paper, from the file's own tensors
    parts = load_file(tmp_path / "sae_weights.safetensors")
    centred = x - parts["b_dec"]
    gate = centred @ parts["W_enc"] + parts["b_gate"]
    codes = (gate > 0) * torch.relu(centred @ (parts["W_enc"] * parts["r_mag"].exp()) + parts["b_mag"])
    torch.testing.assert_close(codes @ parts["W_dec"] + parts["b_dec"], one(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="JumpReLU"):
        save_coder(CODERS["topk"], tmp_path, gated=True)


def test_ranking_by_decoder_norm_is_folded_where_it_was_not(tmp_path: Path) -> None:
    one, x = coder(TopK(3)), torch.randn(50, D, generator=DRAW)
    save_coder(one, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    norms = one.W_dec.norm(dim=1)
    ranked = one.activation(one.preactivations(x) * norms)
    expected = (ranked / norms) @ one.W_dec + one.b_dec
    torch.testing.assert_close(load_coder(tmp_path)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu"])
def test_a_trained_one_comes_back_and_is_its_training(tmp_path: Path, architecture: str) -> None:
    rows, _ = planted(4096)
    rows = rows * 11  # a scale to be folded
    widths = {"widths": (16, 64)} if architecture == "matryoshka" else {}
    config = TrainConfig(
        latents=64,
        k=3,
        batch=512,
        steps=40,
        learning_rate=1e-2,
        architecture=architecture,
        precision="float32",
        **widths,
    )
    (done,) = train(ArraySource(rows), config)
    made = finished_coder(done)
    x, _ = done.inputs({"": rows[:256]})
    torch.testing.assert_close(made(rows[:256]) * done.scale[""], done.reconstruct(x), atol=1e-4, rtol=1e-4)
    save_coder(made, tmp_path)
    torch.testing.assert_close(load_coder(tmp_path)(rows[:256]), made(rows[:256]), atol=1e-5, rtol=1e-5)
