"""Gemma Scope 2's cross-layer transcoders: one file a layer, `.._layer_3.safetensors` or `layer_3/params.safetensors`.

Each holds w_enc [d_model, feature], w_dec [feature, layer_to, d_model] over *all* layers (what would be written to
earlier ones is not used), b_enc, b_dec, threshold and perhaps affine_skip_connection [d_in, d_out]. circuit-tracer 0.5
reads `range(max(layer))` of the files and so drops the last layer; here every layer is read, and a missing one is an
error.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tomoscope.errors import DataError, ModelNotFoundError
from tomoscope.features.activations import JumpReLU
from tomoscope.features.transcoders import CrossLayerTranscoder

_FILE = re.compile(r"layer_(\d+)(?:\.safetensors$|/.*\.safetensors$)")
NEEDED = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


def load_gemma_scope_2(folder: str | Path, *, reads: str = "resid_mid", scan: str = "") -> CrossLayerTranscoder:
    """A cross-layer transcoder from Gemma Scope 2's files.

    Args:
        folder: with one file a layer.
        reads: the part of the block that is read, as their config says ("mlp.in", "resid_mid", "normalized").
        scan: the name under which the features are known elsewhere.

    Raises:
        ModelNotFoundError: no such folder, or no file of a layer in it.
        DataError: a layer is missing, or a file lacks a part.
    """
    folder = Path(folder)
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []:
        match = _FILE.search(path.relative_to(folder).as_posix())
        if match:
            found[int(match[1])] = path
    if not found:
        raise ModelNotFoundError(f"{folder} holds no file of a layer (.._layer_0.safetensors).")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise DataError(f"{folder} has no file for layer {missing[0]}, but one for layer {max(found)}.")
    parts = [_parts(found[layer], layer, len(found)) for layer in range(len(found))]
    skips = tuple(part["affine_skip_connection"].T for part in parts if "affine_skip_connection" in part)
    return CrossLayerTranscoder(
        tuple(part["w_enc"] for part in parts),
        tuple(part["w_dec"][:, layer:] for layer, part in enumerate(parts)),
        tuple(part["b_enc"] for part in parts), tuple(part["b_dec"] for part in parts),
        tuple(JumpReLU(part["threshold"].flatten()) for part in parts), skips, reads=reads, scan=scan,
    )  # fmt: skip


def _parts(path: Path, layer: int, count: int) -> dict[str, Tensor]:
    parts = load_file(path)
    lacking = [name for name in NEEDED if name not in parts]
    if lacking:
        raise DataError(f"{path} holds no {lacking[0]}.")
    if parts["w_dec"].dim() != 3 or parts["w_dec"].shape[1] != count:
        raise DataError(
            f"w_dec of layer {layer} is {list(parts['w_dec'].shape)}, not [feature, {count}, d_model].",
            remedy="Give the files of every layer.",
        )
    return parts
