"""Dictionaries against their formulas, and in every file format that is read, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tomoscope.errors import DataError, ModelNotFoundError
from tomoscope.features import (
    CrossLayerTranscoder,
    JumpReLU,
    ReLU,
    SparseCoder,
    TopK,
    TranscoderSet,
    load_coder,
    load_transcoders,
    save_transcoders,
)
from tomoscope.features import coder as coder_module

D, F = 6, 10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def coder(**changes: object) -> SparseCoder:
    parts = {"W_enc": normal(D, F), "W_dec": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}
    return SparseCoder(**{**parts, **changes})


def test_codes_and_reconstructions_are_their_formulas() -> None:
    x, threshold = normal(3, 4, D), normal(F).abs()
    plain = coder()
    pre = torch.einsum("abd,df->abf", x, plain.W_enc) + plain.b_enc
    torch.testing.assert_close(plain.encode(x), torch.relu(pre))
    torch.testing.assert_close(plain(x), torch.relu(pre) @ plain.W_dec + plain.b_dec)
    jump = coder(activation=JumpReLU(threshold)).encode(x)
    torch.testing.assert_close(jump, torch.where(pre > threshold, pre, torch.zeros(())))
    top = coder(activation=TopK(3)).encode(x)
    for got, own in zip(top.flatten(0, 1), pre.flatten(0, 1), strict=True):
        best = own.argsort(descending=True)[:3]
        expected = torch.zeros(F)
        expected[best] = own[best].clamp(min=0)
        torch.testing.assert_close(got, expected)
    centred = coder(centred=True)
    torch.testing.assert_close(centred.preactivations(x), (x - centred.b_dec) @ centred.W_enc + centred.b_enc)
    which = torch.tensor([1, 7])
    read = x @ centred.encoder_rows(which, x).T + centred.biases(which, x)
    torch.testing.assert_close(read, centred.preactivations(x)[..., which])
    skip = coder(W_skip=normal(D, D))
    torch.testing.assert_close(skip(x), plain(x) + x @ skip.W_skip.T)
    with pytest.raises(DataError, match="skip path"):
        skip.decode(skip.encode(x))


def test_a_threshold_is_strict() -> None:
    pre = torch.tensor([1.0, 0.5, 0.500001])
    assert JumpReLU(torch.full((3,), 0.5))(pre).tolist() == [1.0, 0.0, pytest.approx(0.500001)]
    assert ReLU()(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_sparse_codes_are_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = normal(9, D), coder()
    dense = one.encode(x)
    for piece in (2**24, 2 * F):
        monkeypatch.setattr(coder_module, "PIECE", piece)
        codes = one.sparse(x)
        again = torch.zeros(9, F)
        again[codes.sample, codes.feature] = codes.value
        torch.testing.assert_close(again, dense)
        assert codes.n_samples == 9
        assert len(codes) == int((dense > 0).sum())
        assert (codes.sample * F + codes.feature).diff().min() > 0
    assert len(one.sparse(x[:0])) == 0


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises((DataError, TypeError), match="do not fit|checking the parameters"):
        coder(W_enc=normal(F, D))
    with pytest.raises((DataError, TypeError), match="do not fit|checking the parameters"):
        coder(activation=JumpReLU(torch.zeros(3)))
    with pytest.raises(DataError, match="reads what it writes"):
        coder(W_enc=normal(4, F), centred=True)
    with pytest.raises(DataError, match="different widths"):
        TranscoderSet([coder(), coder(W_enc=normal(4, F))])
    with pytest.raises(DataError, match="no transcoder"):
        TranscoderSet([])
    with pytest.raises(DataError, match="not known"):
        TranscoderSet([coder()], reads="attn.out")
    with pytest.raises(DataError, match="later ones"):
        CrossLayerTranscoder([normal(D, F)] * 2, [normal(F, 2, D)] * 2, [normal(F)] * 2, [normal(D)] * 2)


def test_cross_layer_features_write_to_their_own_and_later_layers() -> None:
    cross = CrossLayerTranscoder(
        [normal(D, F, seed=i) for i in range(3)], [normal(F, 3 - i, D, seed=i) for i in range(3)],
        [normal(F, seed=i) for i in range(3)], [normal(D, seed=i) for i in range(3)],
    )  # fmt: skip
    assert [list(cross.targets(i)) for i in range(3)] == [[0, 1, 2], [1, 2], [2]]
    which = torch.tensor([2, 5])
    torch.testing.assert_close(cross.decoder_rows(0, which, 2, normal(1)), cross.W_dec[0][which, 2])
    torch.testing.assert_close(cross.decoder_rows(1, which, 1, normal(1)), cross.W_dec[1][which, 0])
    codes = [normal(4, F, seed=i).relu() for i in range(3)]
    expected = cross.b_dec[2] + sum(codes[i] @ cross.W_dec[i][:, 2 - i] for i in range(3))
    torch.testing.assert_close(cross.reconstruct(codes, 2), expected)


# ---- files


def same(left: SparseCoder, right: SparseCoder) -> bool:
    skips = (left.W_skip is None) == (right.W_skip is None)
    tensors = [
        (left.W_enc, right.W_enc),
        (left.W_dec, right.W_dec),
        (left.b_enc, right.b_enc),
        (left.b_dec, right.b_dec),
    ]
    if left.W_skip is not None and right.W_skip is not None:
        tensors.append((left.W_skip, right.W_skip))
    if isinstance(left.activation, JumpReLU) and isinstance(right.activation, JumpReLU):
        tensors.append((left.activation.threshold, right.activation.threshold))
    elif left.activation != right.activation:
        return False
    return skips and left.centred == right.centred and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("kind", ["relu", "jump", "topk", "skip"])
@pytest.mark.parametrize("reads", ["mlp.in", "resid_mid", "normalized"])
def test_a_set_is_read_as_it_was_written(tmp_path: Path, kind: str, reads: str) -> None:
    changes = {
        "relu": {}, "jump": {"activation": JumpReLU(normal(F).abs())}, "topk": {"activation": TopK(4)},
        "skip": {"W_skip": normal(D, D)},
    }[kind]  # fmt: skip
    made = TranscoderSet([coder(**changes, W_enc=normal(D, F, seed=i)) for i in range(3)], reads=reads, scan="me/mine")
    save_transcoders(made, tmp_path)
    back = load_transcoders(tmp_path)
    assert (back.reads, back.writes, back.scan, back.n_layers) == (reads, "mlp.out", "me/mine", 3)
    assert all(same(back.coder(i), made.coder(i)) for i in range(3))


@pytest.mark.parametrize("jump", [True, False])
def test_a_cross_layer_set_is_read_as_it_was_written(tmp_path: Path, jump: bool) -> None:
    made = CrossLayerTranscoder(
        [normal(D, F, seed=i) for i in range(2)], [normal(F, 2 - i, D, seed=i) for i in range(2)],
        [normal(F, seed=i) for i in range(2)], [normal(D, seed=i) for i in range(2)],
        [JumpReLU(normal(F, seed=i).abs()) for i in range(2)] if jump else (), reads="resid_mid", scan="cross",
    )  # fmt: skip
    save_transcoders(made, tmp_path)
    back = load_transcoders(tmp_path)
    assert isinstance(back, CrossLayerTranscoder)
    assert (back.reads, back.scan) == ("resid_mid", "cross")
    assert all(same(back.coder(i), made.coder(i)) for i in range(2))
    assert all(torch.equal(a, b) for a, b in zip(back.W_dec, made.W_dec, strict=True))


def test_files_that_lack_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder"):
        load_transcoders(tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match="no transcoders"):
        load_transcoders(tmp_path)
    save_transcoders(TranscoderSet([coder()] * 3), tmp_path)
    (tmp_path / "layer_1.safetensors").unlink()
    with pytest.raises(DataError, match="no file for layer 1"):
        load_transcoders(tmp_path)
    save_transcoders(TranscoderSet([coder()] * 3), tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"feature_input_hook": "hook_attn_out"}))
    with pytest.raises(DataError, match="not known"):
        load_transcoders(tmp_path)
    save_file({"W_enc": normal(F, D)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(DataError, match="no W_dec"):
        load_coder(tmp_path / "layer_0.safetensors")
    with pytest.raises(ModelNotFoundError, match="no file"):
        load_coder(tmp_path / "gone.npz")
    with pytest.raises(ModelNotFoundError, match="known format"):
        load_coder(tmp_path / "config.yaml")


def parts() -> dict[str, Tensor]:
    return {"W_enc": normal(D, F), "W_dec": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}


def test_gemma_scope(tmp_path: Path) -> None:
    own = parts() | {"threshold": normal(F).abs()}
    np.savez(tmp_path / "params.npz", **{name: value.numpy() for name, value in own.items()})
    expected = coder(activation=JumpReLU(own["threshold"]))
    assert same(load_coder(tmp_path / "params.npz"), expected)
    assert same(load_coder(tmp_path), expected)
    (tmp_path / "params.npz").unlink()
    second = {"w_enc": own["W_enc"], "w_dec": own["W_dec"], "b_enc": own["b_enc"], "b_dec": own["b_dec"]}
    skip = normal(D, D)
    save_file(second | {"threshold": own["threshold"], "affine_skip_connection": skip}, tmp_path / "params.safetensors")
    made = load_coder(tmp_path)
    assert same(made, coder(activation=JumpReLU(own["threshold"]), W_skip=skip.T))


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "transcoder", "skip_transcoder"])
def test_saelens(tmp_path: Path, kind: str) -> None:
    own, config = parts(), {"architecture": kind, "k": 4, "normalize_activations": "none"}
    config["apply_b_dec_to_input"] = "transcoder" not in kind
    changes: dict[str, object] = {"centred": config["apply_b_dec_to_input"]}
    if kind == "jumprelu":
        own["threshold"] = normal(F).abs()
        changes["activation"] = JumpReLU(own["threshold"])
    if kind == "topk":
        changes["activation"] = TopK(4)
    if kind == "skip_transcoder":
        own["W_skip"] = normal(D, D)
        changes["W_skip"] = own["W_skip"]
    save_file(own, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert same(load_coder(tmp_path), coder(**changes))
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "layer_norm"}))
    with pytest.raises(DataError, match="normalised"):
        load_coder(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": "temporal"}))
    with pytest.raises(DataError, match="temporal"):
        load_coder(tmp_path)


@pytest.mark.parametrize("transcode", [True, False])
def test_sparsify(tmp_path: Path, transcode: bool) -> None:
    own = parts()
    named = {"encoder.weight": own["W_enc"].T.contiguous(), "encoder.bias": own["b_enc"], "W_dec": own["W_dec"]}
    save_file(named | {"b_dec": own["b_dec"]}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": 4, "transcode": transcode}))
    assert same(load_coder(tmp_path), coder(activation=TopK(4), centred=not transcode))
