"""Gemma Scope 2's cross-layer files: every layer is read, the last one too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.features.parts import normal
from tomoscope.errors import DataError, ModelNotFoundError
from tomoscope.features import load_gemma_scope_2

D, F, LAYERS = 4, 7, 3


def write(folder, *, nested: bool = False, layers: int = LAYERS, **changes):
    made = []
    for layer in range(layers):
        parts = {
            "w_enc": normal(D, F, seed=layer), "w_dec": normal(F, LAYERS, D, seed=layer),
            "b_enc": normal(F, seed=layer), "b_dec": normal(D, seed=layer),
            "threshold": normal(F, seed=layer + 9).abs(), "affine_skip_connection": normal(D, D, seed=layer),
        }  # fmt: skip
        parts = {name: part for name, part in parts.items() if name not in changes.get("without", ())}
        path = (
            folder / f"layer_{layer}" / "params.safetensors" if nested else folder / f"params_layer_{layer}.safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(parts, path)
        made.append(parts)
    return made


@pytest.mark.parametrize("nested", [False, True])
def test_every_layer_is_read_by_its_formula(tmp_path, nested):
    parts = write(tmp_path, nested=nested)
    found = load_gemma_scope_2(tmp_path)
    assert found.n_layers == LAYERS
    x = [normal(5, D, seed=20 + layer) for layer in range(LAYERS)]
    codes = []
    for layer, part in enumerate(parts):
        pre = x[layer] @ part["w_enc"] + part["b_enc"]
        codes.append(pre * (pre > part["threshold"]))
        torch.testing.assert_close(found.coder(layer).encode(x[layer]), codes[-1])
        torch.testing.assert_close(found.W_skip[layer], part["affine_skip_connection"].T)
    for to in range(LAYERS):
        expected = parts[to]["b_dec"] + sum(codes[layer] @ parts[layer]["w_dec"][:, to] for layer in range(to + 1))
        torch.testing.assert_close(found.reconstruct(codes, to), expected)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ModelNotFoundError):
        load_gemma_scope_2(tmp_path)
    write(tmp_path / "a", without=("threshold",))
    with pytest.raises(DataError, match="threshold"):
        load_gemma_scope_2(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "b" / "params_layer_1.safetensors").unlink()
    with pytest.raises(DataError, match="layer 1"):
        load_gemma_scope_2(tmp_path / "b")
    write(tmp_path / "c", layers=2)
    with pytest.raises(DataError, match="every layer"):
        load_gemma_scope_2(tmp_path / "c")
