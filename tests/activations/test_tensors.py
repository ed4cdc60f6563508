"""Our files against the safetensors library, both ways, and what is cut short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tomoscope.activations.tensors import DTYPES, file_hash, map_tensors, write_tensors
from tomoscope.errors import DataError


def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path: Path) -> None:
    held = {
        str(i): (torch.randn(3, 5 + i) * 9).to(dtype) for i, dtype in enumerate(DTYPES.values()) if dtype != torch.bool
    } | {"none": torch.zeros(0, 4), "one": torch.tensor(3.5)}
    said = write_tensors(tmp_path / "a.safetensors", held, {"made": "here"})
    assert said.sha256 == file_hash(tmp_path / "a.safetensors")
    assert said.size == (tmp_path / "a.safetensors").stat().st_size
    theirs = load_file(tmp_path / "a.safetensors")
    save_file(held, tmp_path / "b.safetensors")
    for got in (theirs, map_tensors(tmp_path / "a.safetensors"), map_tensors(tmp_path / "b.safetensors")):
        assert got.keys() == held.keys()
        assert all(torch.equal(got[name], held[name]) and got[name].dtype == held[name].dtype for name in held)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.zeros(100)})
    whole = path.read_bytes()
    for size in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.safetensors"):
            map_tensors(path)
    with pytest.raises(DataError, match="no file"):
        map_tensors(tmp_path / "other.safetensors")
