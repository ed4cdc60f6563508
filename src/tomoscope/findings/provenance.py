"""Where a record comes from: model, data, code, versions, arguments, machine; enough to make it again.

Arguments that were *passed* stand apart from arguments that were *defaulted*: a default may change between versions.
Hashes are SHA-256 over names, types, shapes and bytes. What cannot be known (no git, no /proc) is None or "".
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tomoscope.findings.record import Record

PACKAGES = ("tomoscope", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pydantic", "pyarrow")


class CodeState(Record):
    """The git commit of the code, and whether files differed from it."""

    commit: str | None = None
    dirty: bool | None = None


class Machine(Record):
    """The machine that the record was made on."""

    system: str
    processor: str
    cores: int
    memory_bytes: int | None = None
    device: str = "cpu"


class Provenance(Record):
    """Everything that a record's reader needs to make it again."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Name, source, hash and facts of the model."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data set name to its hash."""
    versions: dict[str, str] = Field(default_factory=dict)
    python: str = ""
    code: CodeState = CodeState()
    machine: Machine
    seed: int = 0
    passed: dict[str, Any] = Field(default_factory=dict)
    """Arguments that the user gave."""
    defaulted: dict[str, Any] = Field(default_factory=dict)
    """Arguments that were left at their defaults, with the values these had."""
    command: str = ""
    """The command as it was given."""


def collect_provenance(
    *,
    seed: int,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    passed: Mapping[str, Any] | None = None,
    defaulted: Mapping[str, Any] | None = None,
    command: str = "",
    device: str = "cpu",
) -> Provenance:
    """Write down what this process and machine are; imports none of the packages whose versions it reads."""
    return Provenance(
        model=dict(model or {}), data=dict(data or {}), versions=package_versions(),
        python=platform.python_version(), code=code_state(Path(__file__).resolve().parent),
        machine=this_machine(device=device), seed=seed, passed=dict(passed or {}), defaulted=dict(defaulted or {}),
        command=command,
    )  # fmt: skip


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by package name; a package that is not installed is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "tomoscope" in names and "tomoscope" not in versions:
        from tomoscope import __version__

        versions["tomoscope"] = __version__
    return versions


def code_state(folder: Path) -> CodeState:
    """The commit and the dirty flag of the git checkout that holds `folder`; unknown where it is not one of ours."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    root = git("rev-parse", "--show-toplevel")
    if not root or not (Path(root) / "src" / "tomoscope").is_dir():  # a checkout that merely holds our virtualenv
        return CodeState()
    status = git("status", "--porcelain", "--untracked-files=no")
    return CodeState(commit=git("rev-parse", "HEAD"), dirty=None if status is None else bool(status))


def this_machine(*, device: str = "cpu") -> Machine:
    """Cores that this process may use, memory, and the processor's name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=f"{platform.system()} {platform.release()}", processor=_processor(), cores=cores,
        memory_bytes=memory_bytes(), device=device,
    )  # fmt: skip


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def reset_peak_memory() -> None:
    """Start a new measurement of the peak, where the system lets a process do so (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process since `reset_peak_memory`; since its start where that is not possible.

    None where the system does not say.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hash_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, types, shapes and bytes of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda pair: pair[0]):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 over texts in their order (lone surrogates included)."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def hash_files(folder: Path, *, pattern: str = "*.safetensors") -> str | None:
    """SHA-256 over the names and contents of a folder's files that match; None where there is none."""
    files = sorted(folder.glob(pattern))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
