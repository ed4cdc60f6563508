"""The two small JSON documents of a run: its manifest, and the mark that an exam is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tomoscope.errors import LedgerError
from tomoscope.findings.provenance import Provenance
from tomoscope.findings.record import Record

SCHEMA = 1

Status = Literal["running", "interrupted", "finished"]
ExamStatus = Literal["done", "inapplicable", "failed", "skipped"]


class Manifest(Record):
    """What the run is: everything that holds for all of its findings."""

    schema_version: int = SCHEMA
    status: Status = "running"
    protocol: dict[str, Any] = Field(default_factory=dict)
    """The protocol as it was resolved: name, description, exams with all their options."""
    rules: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Exam to the sentences of its rules, written here before any exam starts."""
    seed: int = 0
    provenance: Provenance
    correction: str = ""
    """How p-values were corrected, and over how many; "" until the run has finished."""
    started: str = ""
    finished: str = ""

    def identity(self) -> dict[str, Any]:
        """What must be equal for a folder to be resumed: protocol (without its budget), seed, model."""
        protocol = {key: value for key, value in self.protocol.items() if key != "budget_seconds"}
        model = {key: self.provenance.model.get(key) for key in ("name", "hash")}
        return {"protocol": protocol, "seed": self.seed, "model": model}


class ExamRecord(Record):
    """How an exam went: written last, so its presence means that the exam's files are whole."""

    exam: str
    status: ExamStatus
    title: str = ""
    question: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    findings: tuple[str, ...] = ()
    """The ids of its findings, in order."""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    log: tuple[str, ...] = ()
    """What the exam wrote down on its way."""
    error: str = ""
    """Where it failed: the last line of the traceback, which stands whole in error.txt."""


def read_json(path: Path) -> Any:
    """A JSON document. Raises LedgerError where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from error
    except ValueError as error:
        raise LedgerError(f"{path} is not JSON ({error}).", remedy="Run the scan again with --force.") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run's folder. Raises LedgerError where there is none, or one of another schema."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise LedgerError(
            f"{folder} is not a run: it has no manifest.json.", remedy="Give the folder that `tomoscope scan` wrote."
        )
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise LedgerError(
            f"{path} has schema version {version}; this tomoscope reads {SCHEMA}.",
            remedy="Use the tomoscope version that wrote it.",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise LedgerError(
            f"{path} is damaged: {error.errors()[0]['msg']}.", remedy="Run the scan again with --force."
        ) from error


def differences(former: Manifest, wanted: Manifest) -> str:
    """In which parts of their identity two runs differ, in words about the former."""
    a, b = former.identity(), wanted.identity()
    parts = []
    if a["model"] != b["model"]:
        parts.append(f"model {a['model']['name']}")
    if a["seed"] != b["seed"]:
        parts.append(f"seed {a['seed']}")
    if a["protocol"] != b["protocol"]:
        parts.append(f"protocol {a['protocol'].get('name', '')!r} with other exams or options")
    return ", ".join(parts)
