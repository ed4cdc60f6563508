"""The native format: a folder with `cfg.json` and `sae_weights.safetensors`, as SAELens 6 writes and reads it.

What the architecture computes is told by its name: standard (ReLU), topk, jumprelu, gated, and transcoder,
skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder. Dictionaries trained with BatchTopK or as matryoshkas
are saved as jumprelu with one threshold, as SAELens does. Our own sites are under `metadata`, where other tools keep
notes.

How it can mislead: SAELens knows no TopK transcoder and no transcoder that reads several sites; such a file of ours is
read by `load_coder` (`k` stands in cfg.json), and refused or misread elsewhere. A cross-layer transcoder is saved in
circuit-tracer's format (`save_transcoders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tomoscope.activations.tensors import write_tensors
from tomoscope.errors import DataError
from tomoscope.features.activations import JumpReLU, TopK
from tomoscope.features.coder import SparseCoder
from tomoscope.findings.files import write_json, writing

VERSION = "6.54.12"
"""Of SAELens, whose format this is."""

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def architecture_of(coder: SparseCoder) -> str:
    """What SAELens calls it (for TopK transcoders, which it does not have, "topk_transcoder")."""
    rule = "topk" if isinstance(coder.activation, TopK) else "jumprelu" * isinstance(coder.activation, JumpReLU)
    own = coder.reads == coder.writes and coder.W_skip is None and coder.d_in == coder.W_dec.shape[1]
    if own or coder.centred:
        return rule or "standard"
    kind = f"{rule}_" if rule else ""
    return f"{kind}{'skip_' if coder.W_skip is not None else ''}transcoder"


def save_coder(
    coder: SparseCoder,
    folder: str | Path,
    *,
    gated: bool = False,
    metadata: Mapping[str, Any] | None = None,
    log_frequency: Tensor | None = None,
) -> Path:
    """Write a dictionary to a folder in SAELens's format.

    Args:
        coder: the dictionary.
        folder: made if it is not there.
        gated: write a JumpReLU dictionary as the gated one that computes the same.
        metadata: notes for cfg.json (model_name, hook_name, dataset_path, ...).
        log_frequency: [feature], log10 of how often each fires, as `sparsity.safetensors`.

    Returns:
        The folder.

    Raises:
        DataError: `gated` for a dictionary that is no JumpReLU with thresholds of at least 0.
    """
    folder = Path(folder)
    architecture = architecture_of(coder)
    parts = {"W_enc": coder.W_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if gated:
        if architecture != "jumprelu" or not isinstance(coder.activation, JumpReLU) or not coder.centred:
            raise DataError("Only a JumpReLU autoencoder that takes b_dec from its input can be written as gated.")
        if bool((coder.activation.threshold < 0).any()):
            raise DataError("A gated dictionary can't have a threshold under 0.")
        architecture = "gated"
        parts |= {"b_mag": coder.b_enc, "r_mag": torch.zeros_like(coder.b_enc)}
        parts |= {"b_gate": coder.b_enc - coder.activation.threshold.to(coder.b_enc)}
    else:
        parts["b_enc"] = coder.b_enc
        if isinstance(coder.activation, JumpReLU):
            parts["threshold"] = coder.activation.threshold
    if coder.W_skip is not None:
        parts["W_skip"] = coder.W_skip
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": coder.d_in, "d_sae": coder.n_features, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": coder.centred, "normalize_activations": "none",
        "reshape_activations": "hook_z" if coder.reads.endswith("attn.z") and "transcoder" not in architecture else
        "none", "metadata": {
            "sae_lens_version": VERSION, "sae_lens_training_version": None, "tomoscope_reads": coder.reads,
            "tomoscope_writes": coder.writes, "tomoscope_name": coder.name, **(metadata or {}),
        },
    }  # fmt: skip
    if "transcoder" in architecture:
        config["d_out"] = coder.W_dec.shape[1]
    if isinstance(coder.activation, TopK):
        config |= {"k": coder.activation.k, "rescale_acts_by_decoder_norm": False}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: value.float() for name, value in parts.items()})
    if log_frequency is not None:
        write_tensors(folder / "sparsity.safetensors", {"sparsity": log_frequency})
    write_json(folder / CONFIG, config)
    return folder
