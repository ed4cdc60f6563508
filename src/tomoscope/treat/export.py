"""Steering that leaves tomoscope: llama.cpp's control vector (GGUF), and a safetensors with all that a hook needs.

`write_control_vector` writes what `llama-cli --control-vector` reads: one F32 tensor "direction.N" a layer, which is
added to block N's output. Block 0 cannot be told in that format (its reader counts from 1), and is refused.
`save_steering` writes each layer's vector with the path of the block it is added to; `HOW_TO_STEER`, which is in the
file's header too, is the code that steers with plain transformers.

How it can mislead: both add at every token, prompt and generated; a direction that was meant for one position does
something else there.

Source of the format: the GGUF specification, version 3.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from tomoscope.concepts.direction import Direction
from tomoscope.errors import DataError, EditError
from tomoscope.model import Subject

HOW_TO_STEER = """\
from safetensors import safe_open

def steer(model, path, strength=1.0):
    hooks = []
    with safe_open(path, "pt") as file:
        for name in file.keys():
            vector = file.get_tensor(name)
            def add(module, inputs, output, vector=vector):
                first = output[0] if isinstance(output, tuple) else output
                moved = first + strength * vector.to(first)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved
            hooks.append(model.get_submodule(name).register_forward_hook(add))
    return hooks  # for hook in hooks: hook.remove()
"""
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_STRING, _UINT32, _F32 = 8, 4, 0


def _by_layer(directions: Sequence[Direction], strength: float) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for one in directions:
        head, _, part = one.site.partition(".resid_post")
        layer = head.removeprefix("layer.")
        if part or not one.site.endswith(".resid_post") or not layer.isdigit():
            raise EditError(
                f"{one.site} cannot be exported: the formats add to whole blocks' outputs.",
                remedy="Give directions of layer.N.resid_post.",
            )
        assert one.shift is not None
        found[int(layer)] = found.get(int(layer), 0.0) + strength * one.shift.float()
    if not found:
        raise EditError("There is no direction to write.", remedy="Give at least one.")
    return found


def write_control_vector(
    path: str | Path, directions: Sequence[Direction], *, strength: float = 1.0, model_hint: str = "llama"
) -> Path:
    """Write a GGUF control vector; the strength is baked in.

    Raises:
        EditError: a direction of another site than a block's output, or of block 0.
    """
    vectors = _by_layer(directions, strength)
    if 0 in vectors:
        raise EditError(
            "A control vector cannot hold block 0: its readers count directions from 1.",
            remedy="Steer at a later layer, or use save_steering.",
        )
    facts: list[tuple[str, int, Any]] = [
        ("general.architecture", _STRING, "controlvector"), ("controlvector.model_hint", _STRING, model_hint),
        ("controlvector.layer_count", _UINT32, len(vectors)),
    ]  # fmt: skip
    out = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(vectors), len(facts)))
    for key, kind, value in facts:
        out += _text(key) + struct.pack("<I", kind)
        out += _text(value) if kind == _STRING else struct.pack("<I", value)
    data = bytearray()
    for layer in sorted(vectors):
        raw = vectors[layer].contiguous().numpy().astype("<f4").tobytes()
        out += _text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(vectors[layer]), _F32, len(data))
        data += raw + b"\0" * (-len(raw) % _ALIGNMENT)
    out += b"\0" * (-len(out) % _ALIGNMENT)
    path = Path(path)
    try:
        path.write_bytes(bytes(out + data))
    except OSError as error:
        raise DataError(f"{path} could not be written: {error.strerror}.", remedy="Give another path.") from error
    return path


def read_control_vector(path: str | Path) -> tuple[dict[str, Any], dict[int, Float[np.ndarray, " width"]]]:
    """Facts and vectors by layer of a GGUF control vector. Raises DataError for anything else."""
    try:
        raw = Path(path).read_bytes()
        if raw[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        _, tensors, count = struct.unpack_from("<IQQ", raw, 4)
        place, facts = 24, {}
        for _ in range(count):
            key, place = _read_text(raw, place)
            (kind,) = struct.unpack_from("<I", raw, place)
            if kind == _STRING:
                facts[key], place = _read_text(raw, place + 4)
            elif kind == _UINT32:
                facts[key], place = struct.unpack_from("<I", raw, place + 4)[0], place + 8
            else:
                raise ValueError(f"the fact {key!r} is of a kind that is not read ({kind})")
        if facts.get("general.architecture") != "controlvector":
            raise ValueError(f"it is of architecture {facts.get('general.architecture')!r}")
        told = []
        for _ in range(tensors):
            name, place = _read_text(raw, place)
            dims, size, kind, offset = struct.unpack_from("<IQIQ", raw, place)
            if dims != 1 or kind != _F32:
                raise ValueError(f"{name} is no row of 32-bit numbers")
            told.append((int(name.removeprefix("direction.")), size, offset))
            place += 24
        start = place + (-place % _ALIGNMENT)
        return facts, {n: np.frombuffer(raw, "<f4", size, start + offset).copy() for n, size, offset in told}
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no control vector: {error}.", remedy="Give a GGUF control vector.") from error


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _read_text(raw: bytes, place: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", raw, place)
    if size > len(raw):
        raise ValueError("a text runs past its end")
    return raw[place + 8 : place + 8 + size].decode(), place + 8 + size


def save_steering(
    subject: Subject, path: str | Path, directions: Sequence[Direction], *, strength: float = 1.0
) -> Path:
    """Write each block's vector under the block's path in the model, with the code that steers in the header."""
    vectors = _by_layer(directions, strength)
    tensors = {subject.structure.blocks[layer].path: vector for layer, vector in vectors.items()}
    metadata = {
        "format": "steering vectors by module path, added to its output at every token", "how": HOW_TO_STEER,
        "concepts": json.dumps([one.concept for one in directions]), "model": subject.name,
    }  # fmt: skip
    path = Path(path)
    try:
        save_file({name: vector.contiguous().clone() for name, vector in tensors.items()}, path, metadata=metadata)
    except OSError as error:
        raise DataError(f"{path} could not be written: {error}.", remedy="Give another path.") from error
    return path


def torch_vectors(vectors: dict[int, np.ndarray]) -> dict[int, Tensor]:
    """What `read_control_vector` gave, as tensors."""
    return {layer: torch.from_numpy(vector) for layer, vector in vectors.items()}
