"""Dictionaries in the field's file formats: read by what the files hold, never unpickled.

    load_transcoders(folder)        a set for every layer: circuit-tracer's per-layer files (layer_0.safetensors ...)
                                    or its cross-layer ones (W_enc_0.safetensors ...), perhaps with config.yaml
    save_coder(coder, folder)       the native format: a folder as SAELens 6 writes and reads it
    load_coder(path)                one dictionary: a circuit-tracer layer file, Gemma Scope params.npz, Gemma Scope 2
                                    params.safetensors, a SAELens folder (cfg.json), a sparsify one (sae.safetensors)
    save_transcoders(set, folder)   circuit-tracer's formats

Safetensors are memory-mapped and stay in their own type, so that a dictionary larger than memory can be opened; rows
are cast where they are used. How it can mislead: a file says what it computes only by its names; a dictionary trained
on scaled or normalised activations (SAELens `normalize_activations`) is refused, for its codes would be wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomoscope.errors import DataError, ModelNotFoundError
from tomoscope.features.activations import Activation, JumpReLU, ReLU, TopK
from tomoscope.features.coder import SparseCoder
from tomoscope.features.transcoders import CrossLayerTranscoder, Transcoders, TranscoderSet

HOOKS = {
    "hook_resid_mid": "resid_mid", "hook_mlp_in": "resid_mid", "mlp.hook_in": "mlp.in",
    "ln2.hook_normalized": "normalized", "hook_mlp_out": "mlp.out", "mlp.hook_out": "mlp.out",
}  # fmt: skip
"""What circuit-tracer's configs call the places that transcoders read and write."""
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors$")
_CROSS_FILE = re.compile(r"W_enc_(\d+)\.safetensors$")


def load_transcoders(folder: str | Path) -> Transcoders:
    """Transcoders for every layer, from a folder of circuit-tracer's files.

    Raises:
        ModelNotFoundError: no such folder, or no file of a known name in it.
        DataError: a layer is missing, a file lacks a part, or the config asks for what is not known here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelNotFoundError(f"There is no folder {folder}.", remedy="Give a folder of transcoder files.")
    config = _config(folder)
    scan = str(config.get("scan", ""))
    cross = _numbered(folder, _CROSS_FILE)
    if cross:
        return _cross_layer(folder, len(cross), config, scan)
    layers = _numbered(folder, _LAYER_FILE)
    if not layers:
        raise ModelNotFoundError(
            f"{folder} holds no transcoders: no layer_0.safetensors and no W_enc_0.safetensors.",
            remedy="Load single dictionaries with load_coder and put them into a TranscoderSet.",
        )
    reads, writes = _places(config)
    activation = _declared(config)
    coders = tuple(_circuit_tracer(layers[i], activation) for i in range(len(layers)))
    return TranscoderSet(coders, reads=reads or "mlp.in", writes=writes, scan=scan)


def load_coder(path: str | Path) -> SparseCoder:
    """One dictionary from a file or folder of a format told by its names.

    Raises:
        ModelNotFoundError: no such file, or none of a known format.
        DataError: parts are missing or do not fit, or the input was normalised in training.
    """
    path = Path(path)
    if path.is_dir():
        for name, read in (("sae_weights.safetensors", _saelens), ("sae.safetensors", _sparsify),
                           ("params.npz", load_coder), ("params.safetensors", _gemma_scope_2)):  # fmt: skip
            if (path / name).exists():
                return read(path / name)
        raise ModelNotFoundError(f"{path} holds no dictionary of a known format.")
    if not path.exists():
        raise ModelNotFoundError(f"There is no file {path}.")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            parts = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        coder = _made(path, parts, "W_enc", "W_dec", activation=_threshold(parts, "threshold"))
        return coder
    if path.suffix != ".safetensors":
        raise ModelNotFoundError(f"{path.name} is of no known format.", remedy="Known are .safetensors and .npz.")
    readers: dict[str, Callable[[Path], SparseCoder]] = {
        "sae_weights.safetensors": _saelens, "sae.safetensors": _sparsify, "params.safetensors": _gemma_scope_2,
    }  # fmt: skip
    return readers.get(path.name, _circuit_tracer)(path)


def save_transcoders(transcoders: Transcoders, folder: str | Path) -> None:
    """Write circuit-tracer's files: layer_{i}.safetensors, or W_enc_{i} and W_dec_{i}, and config.yaml.

    Raises:
        DataError: a dictionary takes b_dec from its input, which that format can't say.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hooks = {part: hook for hook, part in reversed(HOOKS.items())}
    cross = isinstance(transcoders, CrossLayerTranscoder)
    config: dict[str, Any] = {
        "model_kind": "cross_layer_transcoder" if cross else "transcoder_set", "scan": transcoders.scan,
        "feature_input_hook": hooks[transcoders.reads], "feature_output_hook": hooks[transcoders.writes],
    }  # fmt: skip
    for layer in range(transcoders.n_layers):
        coder = transcoders.coder(layer)
        if coder.centred:
            raise DataError("circuit-tracer's format can't say that b_dec is taken from the input.")
        parts = {"W_enc": coder.W_enc.T, "b_enc": coder.b_enc, "b_dec": coder.b_dec}
        if cross:
            if isinstance(coder.activation, JumpReLU):
                parts["threshold"] = coder.activation.threshold
            if coder.W_skip is not None:
                raise DataError("circuit-tracer's cross-layer files hold no skip path.")
            named = {f"{name}_{layer}": part.contiguous() for name, part in parts.items()}
            save_file(named, folder / f"W_enc_{layer}.safetensors")
            save_file({f"W_dec_{layer}": transcoders.W_dec[layer].contiguous()}, folder / f"W_dec_{layer}.safetensors")
            continue
        parts["W_dec"] = coder.W_dec
        if isinstance(coder.activation, JumpReLU):
            parts["activation_function.threshold"] = coder.activation.threshold
        if isinstance(coder.activation, TopK):
            config |= {"activation": "topk", "k": coder.activation.k}
            parts["k"] = torch.tensor(coder.activation.k)
        if coder.W_skip is not None:
            parts["W_skip"] = coder.W_skip
        save_file({name: part.contiguous() for name, part in parts.items()}, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


# ---- circuit-tracer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {error}.") from error
    return config if isinstance(config, dict) else {}


def _places(config: Mapping[str, Any]) -> tuple[str, str]:
    """What the config says is read and written; "" for a reading it does not name."""
    found = []
    for key, default in (("feature_input_hook", ""), ("feature_output_hook", "hook_mlp_out")):
        hook = config.get(key, default)
        if hook and hook not in HOOKS:
            raise DataError(f"{key} {hook!r} is not known.", remedy=f"Known are {', '.join(HOOKS)}.")
        found.append(HOOKS.get(hook, ""))
    return found[0], found[1]


def _declared(config: Mapping[str, Any]) -> Activation | None:
    """The activation that a config names, or None where the files tell."""
    name = config.get("activation")
    if name == "topk":
        if not config.get("k"):
            raise DataError("The config says topk and no k.")
        return TopK(int(config["k"]))
    if name in (None, "jump_relu"):
        return None
    if name == "relu":
        return ReLU()
    raise DataError(f"The activation {name!r} is not known.", remedy="Known are relu, jump_relu and topk.")


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = {int(m[1]): path for path in folder.iterdir() if (m := pattern.search(path.name))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise DataError(f"{folder} has no file for layer {missing[0]}, but one for layer {max(found)}.")
    return found


def _circuit_tracer(path: Path, activation: Activation | None = None) -> SparseCoder:
    parts = load_file(path)
    if activation is None and "k" in parts:
        activation = TopK(int(parts["k"]))
    activation = activation or _threshold(parts, "activation_function.threshold")
    return _made(path, parts, "W_enc", "W_dec", transposed=True, activation=activation, skip=parts.get("W_skip"))


def _cross_layer(folder: Path, count: int, config: Mapping[str, Any], scan: str) -> CrossLayerTranscoder:
    reads, writes = _places(config)
    parts: dict[str, Tensor] = {}
    for layer in range(count):
        parts |= load_file(folder / f"W_enc_{layer}.safetensors")
        decoder = folder / f"W_dec_{layer}.safetensors"
        if not decoder.exists():
            raise DataError(f"{folder} has an encoder and no decoder for layer {layer}.")
        parts |= load_file(decoder)
    names = [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "W_dec") for layer in range(count)]
    lacking = [name for name in names if name not in parts]
    if lacking:
        raise DataError(f"The files in {folder} lack {lacking[0]}.")
    return CrossLayerTranscoder(
        tuple(parts[f"W_enc_{i}"].T for i in range(count)), tuple(parts[f"W_dec_{i}"] for i in range(count)),
        tuple(parts[f"b_enc_{i}"] for i in range(count)), tuple(parts[f"b_dec_{i}"] for i in range(count)),
        tuple(_threshold(parts, f"threshold_{i}") for i in range(count)),
        reads=reads or "resid_mid", writes=writes, scan=scan,
    )  # fmt: skip


# ---- single dictionaries


def _threshold(parts: Mapping[str, Tensor], name: str) -> Activation:
    return JumpReLU(parts[name].flatten()) if name in parts else ReLU()


def _made(
    path: Path,
    parts: Mapping[str, Tensor],
    encoder: str,
    decoder: str,
    *,
    transposed: bool = False,
    activation: Activation,
    skip: Tensor | None = None,
    centred: bool = False,
    b_enc: str = "b_enc",
) -> SparseCoder:
    lacking = [name for name in (encoder, decoder, b_enc, "b_dec") if name not in parts]
    if lacking:
        raise DataError(f"{path} holds no {lacking[0]}, so it is no dictionary of this format.")
    W_enc = parts[encoder].T if transposed else parts[encoder]
    name = f"{path.parent.name}/{path.name}"
    return SparseCoder(
        W_enc, parts[decoder], parts[b_enc], parts["b_dec"], activation, skip, centred=centred, name=name
    )


def _gemma_scope_2(path: Path) -> SparseCoder:
    parts = load_file(path)
    skip = parts.get("affine_skip_connection")  # stored [d_in, d_out]
    return _made(
        path, parts, "w_enc", "w_dec", activation=_threshold(parts, "threshold"), skip=None if skip is None else skip.T
    )


def _sparsify(path: Path) -> SparseCoder:
    parts, config = load_file(path), _json(path.with_name("cfg.json"))
    if config.get("activation", "topk") != "topk":
        raise DataError(f"{path} uses the activation {config['activation']!r}, which is not known here.")
    return _made(
        path, parts, "encoder.weight", "W_dec", transposed=True, b_enc="encoder.bias", skip=parts.get("W_skip"),
        activation=TopK(int(config.get("k", 32))), centred=not config.get("transcode", False),
    )  # fmt: skip


def _saelens(path: Path) -> SparseCoder:
    parts, config = load_file(path), _json(path.with_name("cfg.json"))
    kind = str(config.get("architecture", "standard"))
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", None, False):
        raise DataError(
            f"{path} was trained on normalised activations ({normalised}), which the file does not hold.",
            remedy="Fold the scale into the weights when saving (SAELens: fold_activation_norm_scaling_factor).",
        )
    if kind == "gated":
        return _gated(path, parts)
    if kind in ("standard", "transcoder", "skip_transcoder"):
        activation: Activation = ReLU()
    elif kind in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        activation = _threshold(parts, "threshold")
    elif kind in ("topk", "topk_transcoder", "topk_skip_transcoder"):
        activation = TopK(int(config["k"]))
    else:
        raise DataError(f"The SAELens architecture {kind!r} is not known here.")
    centred = bool(config.get("apply_b_dec_to_input", "transcoder" not in kind))
    coder = _made(
        path, parts, "W_enc", "W_dec", activation=activation, skip=parts.get("W_skip"), centred=centred
    )  # fmt: skip
    return _placed(_ranked_by_norm(coder) if config.get("rescale_acts_by_decoder_norm") else coder, config)


def _ranked_by_norm(coder: SparseCoder) -> SparseCoder:
    """Latents that compete by code x decoder norm: the norms go into the encoder, and decoder rows have norm 1."""
    norms = coder.W_dec.norm(dim=1)
    if bool((norms - 1).abs().max() < 1e-4):
        return coder  # saved for inference: folded already
    norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return replace(coder, W_enc=coder.W_enc * norms, b_enc=coder.b_enc * norms, W_dec=coder.W_dec / norms[:, None])


def _gated(path: Path, parts: Mapping[str, Tensor]) -> SparseCoder:
    """A gate that shares the magnitude's directions is a threshold on the magnitude: a JumpReLU, exactly."""
    lacking = [name for name in ("b_gate", "b_mag", "r_mag") if name not in parts]
    if lacking:
        raise DataError(f"{path} holds no {lacking[0]}, so it is no gated dictionary.")
    grown = parts["r_mag"].exp()
    threshold = (parts["b_mag"] - grown * parts["b_gate"]).clamp(min=0)
    made = dict(parts) | {"W_enc": parts["W_enc"] * grown, "b_enc": parts["b_mag"]}
    coder = _made(path, made, "W_enc", "W_dec", activation=JumpReLU(threshold), centred=True)
    return _placed(coder, _json(path.with_name("cfg.json")))


def _placed(coder: SparseCoder, config: Mapping[str, Any]) -> SparseCoder:
    """With the sites that our own files name."""
    told = config.get("metadata")
    told = told if isinstance(told, dict) else {}
    return replace(
        coder, reads=str(told.get("tomoscope_reads", coder.reads)), writes=str(told.get("tomoscope_writes",
        coder.writes)), name=str(told.get("tomoscope_name", coder.name)),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"There is no {path.name} beside the weights in {path.parent}.") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
