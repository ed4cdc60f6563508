"""One safetensors file: written whole with its checksum, read as a memory map at the header's data offset.

The format is safetensors' own (eight bytes with the header's length, a JSON header, raw bytes), so any tool reads the
files. We read them by our own map because a slice through the library costs a copy a call (530 MB a CPU-second against
8,900 for rows of a map), and a map costs no memory until a row is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.findings.files import sync_folder, writing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGN = 64
"""Where data begins: a multiple of this, so that rows lie on cache lines."""
BLOCK = 1 << 24


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        size: bytes.
        sha256: of the whole file.
    """

    size: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write tensors to a safetensors file, whole or not at all.

    Raises:
        LedgerError: the disk is full or may not be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in held.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    digest, total = hashlib.sha256(), 0
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in (len(text).to_bytes(8, "little"), text, *map(_bytes, held.values())):
                    view = memoryview(piece)  # ty: ignore[invalid-argument-type]: arrays are buffers, also before 3.12
                    for start in range(0, len(view), BLOCK):
                        digest.update(view[start : start + BLOCK])
                        file.write(view[start : start + BLOCK])
                    total += len(view)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    return Written(total, digest.hexdigest())


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read; writing to them changes no file.

    Raises:
        DataError: the file is absent, cut short, or no safetensors.
    """
    header, start, size = _header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start + end > size:
            raise DataError(f"{path} is cut short: {name} ends at byte {start + end} of {size}.", remedy=MEND)
        count = math.prod(shape)
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
        out[name] = flat.to(dtype).reshape(shape)
    return out


def touch(mapped: Tensor) -> None:
    """Read a run of mapped rows from disk, in order: rows taken in random order after this come from memory."""
    mapped.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


MEND = "Remove the file and harvest again: what is whole is kept, and what is missing is made again."


def _header(path: Path) -> tuple[dict, int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("the header's length does not fit the file")
            return json.loads(file.read(length)), 8 + length, size
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.", remedy=MEND) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}.", remedy=MEND) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises DataError where it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", remedy=MEND) from error
