"""Dictionaries from and to the field's other files: dictionary_learning, sparsify, Gemma Scope.

    import_coder("trainer_0")                       told by what the folder or file holds
    export_coder(coder, "out", "sparsify")

What a format can't say is rewritten exactly where there is an equal form (a centred input becomes a bias, and back; a
gate that shares the magnitude's directions is a threshold), and refused where there is none. circuit-tracer's sets are
`load_transcoders` and `save_transcoders`. dictionary_learning stores weights with Python's pickle: they are read with
`weights_only=True`, which runs no code.

Where peers differ from the files' own authors, the authors' code is followed: sparsify's `W_dec` is [feature, d] as
stored and its autoencoders always take `b_dec` from the input (SAELens 6.54 transposes it and asks
`normalize_decoder`); a BatchTopK dictionary infers by its threshold.

Sources: dictionary_learning (Marks et al.), EleutherAI sparsify, Gemma Scope (arXiv:2408.05147).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tomoscope.errors import DataError, ModelNotFoundError, nearest
from tomoscope.features.activations import Activation, JumpReLU, ReLU, TopK
from tomoscope.features.coder import SparseCoder
from tomoscope.features.formats import load_coder
from tomoscope.findings.files import write_bytes, write_json

Weights = Mapping[str, Tensor]


def import_coder(path: str | Path) -> SparseCoder:
    """One dictionary from a file or folder of any format that is known.

    Raises:
        ModelNotFoundError: nothing of a known format.
        DataError: parts are missing or do not fit.
    """
    path = Path(path)
    for name in ("ae.pt", "params.npz"):
        if path.is_dir() and (path / name).exists():
            path = path / name
    return _dictionary_learning(path) if path.suffix == ".pt" else load_coder(path)


def export_coder(coder: SparseCoder, path: str | Path, kind: str) -> Path:
    """Write a dictionary in a format of `FORMATS`.

    Args:
        coder: the dictionary.
        path: a folder (Gemma Scope: the folder of params.npz).
        kind: the format's name.

    Returns:
        The folder.

    Raises:
        DataError: the format is not known, or can't say what this dictionary does.
    """
    if kind not in FORMATS:
        raise DataError(
            f"The format {kind!r} is not known.", remedy=nearest(kind, FORMATS) or f"Known: {', '.join(FORMATS)}."
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[kind](coder, folder)
    return folder


def recentred(coder: SparseCoder, centred: bool) -> SparseCoder:
    """The same dictionary with b_dec taken from its input or not: what changes is the encoder's bias.

    Raises:
        DataError: a dictionary that writes another width than it reads can't be centred.
    """
    if coder.centred == centred:
        return coder
    if coder.W_enc.shape[0] != coder.W_dec.shape[1]:
        raise DataError("A dictionary that reads one site and writes another can't take b_dec from its input.")
    moved = (coder.b_dec.double() @ coder.W_enc.double()).to(coder.b_enc)
    return replace(coder, b_enc=coder.b_enc + moved if centred else coder.b_enc - moved, centred=centred)


def _no_skip(coder: SparseCoder, kind: str) -> None:
    if coder.W_skip is not None:
        raise DataError(f"{kind}'s files hold no skip path.")


# ---- dictionary_learning


def _dictionary_learning(path: Path) -> SparseCoder:
    if not path.exists():
        raise ModelNotFoundError(f"There is no {path}.")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own unpickler raises many kinds
        raise DataError(f"{path} can't be read as weights: {error}.") from error
    if not isinstance(parts, dict) or not all(isinstance(part, Tensor) for part in parts.values()):
        raise DataError(f"{path} holds more than weights.")
    config = _config(path.with_name("config.json"))
    kind = str(config.get("dict_class", "")) or _class_of(parts)
    readers: dict[str, Callable[[Weights], SparseCoder]] = {
        "AutoEncoder": _autoencoder, "GatedAutoEncoder": _gated, "JumpReluAutoEncoder": _jump,
        "AutoEncoderTopK": _topk, "BatchTopKSAE": _batch_topk, "MatryoshkaBatchTopKSAE": _batch_topk,
    }  # fmt: skip
    if kind not in readers:
        raise DataError(f"The dictionary_learning class {kind!r} is not known.", remedy=nearest(kind, readers))
    try:
        made = readers[kind](parts)
    except KeyError as error:
        raise DataError(f"{path} holds no {error}, so it is no {kind}.") from error
    return replace(made, name=f"{path.parent.name}/{path.name}")


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    trainer = config.get("trainer", {}) if isinstance(config, dict) else {}
    return trainer if isinstance(trainer, dict) else {}


def _class_of(parts: Weights) -> str:
    """The class by what it stores, where no config says it."""
    if "r_mag" in parts:
        return "GatedAutoEncoder"
    if "bias" in parts:
        return "AutoEncoder"
    if "k" not in parts:
        return "JumpReluAutoEncoder"
    if "W_enc" in parts:
        return "MatryoshkaBatchTopKSAE"
    threshold = parts.get("threshold")
    return "BatchTopKSAE" if threshold is not None and float(threshold) >= 0 else "AutoEncoderTopK"


def _made(parts: Weights, activation: Activation, *, b_enc: Tensor, b_dec: Tensor, centred: bool = True) -> SparseCoder:
    if "W_enc" in parts:
        W_enc, W_dec = parts["W_enc"], parts["W_dec"]
    else:
        W_enc, W_dec = parts["encoder.weight"].T.contiguous(), parts["decoder.weight"].T.contiguous()
    return SparseCoder(W_enc, W_dec, b_enc, b_dec, activation, centred=centred)


def _autoencoder(parts: Weights) -> SparseCoder:
    return _made(parts, ReLU(), b_enc=parts["encoder.bias"], b_dec=parts["bias"])


def _gated(parts: Weights) -> SparseCoder:
    grown = parts["r_mag"].exp()
    made = _made(parts, ReLU(), b_enc=parts["mag_bias"], b_dec=parts["decoder_bias"])
    # the gate opens where h + b_gate > 0, which is where e^r h + b_mag > b_mag - e^r b_gate
    threshold = (parts["mag_bias"] - grown * parts["gate_bias"]).clamp(min=0)
    return replace(made, W_enc=made.W_enc * grown, activation=JumpReLU(threshold))


def _jump(parts: Weights) -> SparseCoder:
    threshold = parts["threshold"].clamp(min=0)
    return _made(parts, JumpReLU(threshold), b_enc=parts["b_enc"], b_dec=parts["b_dec"], centred=False)


def _bias(parts: Weights) -> Tensor:
    return parts["b_enc"] if "b_enc" in parts else parts["encoder.bias"]


def _topk(parts: Weights) -> SparseCoder:
    return _made(parts, TopK(int(parts["k"])), b_enc=_bias(parts), b_dec=parts["b_dec"])


def _batch_topk(parts: Weights) -> SparseCoder:
    threshold = float(parts["threshold"])
    if threshold < 0:
        raise DataError(
            "The threshold of this BatchTopK dictionary was never set, so it can't be used without its batch.",
            remedy="Train it past the step at which the threshold is estimated.",
        )
    bias = _bias(parts)
    return _made(parts, JumpReLU(torch.full_like(bias, threshold)), b_enc=bias, b_dec=parts["b_dec"])


def _save_dictionary_learning(coder: SparseCoder, folder: Path) -> None:
    _no_skip(coder, "dictionary_learning")
    activation = coder.activation
    if isinstance(activation, JumpReLU):
        plain = recentred(coder, False)
        kind, parts = "JumpReluAutoEncoder", {
            "W_enc": plain.W_enc, "W_dec": plain.W_dec, "b_enc": plain.b_enc, "b_dec": plain.b_dec,
            "threshold": activation.threshold,
        }  # fmt: skip
    elif isinstance(activation, TopK | ReLU):
        plain = recentred(coder, True)
        parts = {
            "encoder.weight": plain.W_enc.T, "encoder.bias": plain.b_enc, "decoder.weight": plain.W_dec.T,
            "b_dec" if isinstance(activation, TopK) else "bias": plain.b_dec,
        }  # fmt: skip
        kind = "AutoEncoder"
        if isinstance(activation, TopK):
            kind = "AutoEncoderTopK"
            parts |= {"k": torch.tensor(activation.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    else:
        raise DataError(f"dictionary_learning has no class for {type(activation).__name__}.")
    buffer = io.BytesIO()
    torch.save({name: part.float().contiguous() if part.is_floating_point() else part for name, part in parts.items()},
               buffer)  # fmt: skip
    write_bytes(folder / "ae.pt", buffer.getvalue())
    trainer: dict[str, Any] = {
        "dict_class": kind,
        "activation_dim": coder.d_in,
        "dict_size": coder.n_features,
        "submodule_name": coder.reads,
    }
    if isinstance(activation, TopK):
        trainer["k"] = activation.k
    write_json(folder / "config.json", {"trainer": trainer})


# ---- sparsify


def _save_sparsify(coder: SparseCoder, folder: Path) -> None:
    if not isinstance(coder.activation, TopK):
        raise DataError(f"sparsify's files hold TopK dictionaries, not {type(coder.activation).__name__}.")
    transcodes = coder.W_skip is not None or coder.reads != coder.writes or coder.d_in != coder.W_dec.shape[1]
    plain = recentred(coder, False) if transcodes else recentred(coder, True)
    parts = {"encoder.weight": plain.W_enc.T, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if coder.W_skip is not None:
        parts["W_skip"] = coder.W_skip
    save_file({name: part.float().contiguous() for name, part in parts.items()}, folder / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": max(1, coder.n_features // coder.d_in), "normalize_decoder": False,
        "num_latents": coder.n_features, "k": coder.activation.k, "multi_topk": False, "d_in": coder.d_in,
        "skip_connection": coder.W_skip is not None, "transcode": transcodes,
    }  # fmt: skip
    write_json(folder / "cfg.json", config)


# ---- Gemma Scope


def _save_gemma_scope(coder: SparseCoder, folder: Path) -> None:
    _no_skip(coder, "Gemma Scope")
    plain = recentred(coder, False)
    if isinstance(plain.activation, JumpReLU):
        threshold = plain.activation.threshold
    elif isinstance(plain.activation, ReLU):
        threshold = torch.zeros(coder.n_features)  # what is above 0, strictly, is what a ReLU lets through
    else:
        raise DataError(f"Gemma Scope's files hold JumpReLU dictionaries, not {type(coder.activation).__name__}.")
    buffer = io.BytesIO()
    parts = {"W_enc": plain.W_enc, "W_dec": plain.W_dec, "b_enc": plain.b_enc, "b_dec": plain.b_dec}
    np.savez(buffer, **{name: part.float().numpy() for name, part in (parts | {"threshold": threshold}).items()})
    write_bytes(folder / "params.npz", buffer.getvalue())


FORMATS: dict[str, Callable[[SparseCoder, Path], None]] = {
    "dictionary_learning": _save_dictionary_learning,
    "sparsify": _save_sparsify,
    "gemma_scope": _save_gemma_scope,
}
"""Name -> writer of one dictionary."""
