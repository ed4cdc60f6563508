"""The ledger: one folder is one run, and everything else (report, viewer, data frames) only reads it.

    run/manifest.json               schema, status, provenance, protocol, declared rules, seed
    run/findings.jsonl              one line a version of a finding; lines are appended and never changed
    run/exams/<exam>/arrays.safetensors, <table>.parquet, error.txt, done.json

Steps of an exam's life: its arrays and tables are written, then its findings are appended and synced, then
`done.json` marks it whole. A run that is killed loses at most the exam in hand: lines and arrays without the mark are
ignored by readers and cleared on resuming. The correction for the number of claims appends a second version of each
finding, so the raw verdict stays readable (`history`). Only one process at a time may write (an advisory lock, which
the kernel frees).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import ValidationError

from tomoscope.errors import LedgerError, nearest
from tomoscope.findings.files import (
    acquire_lock,
    append_lines,
    ledger_error,
    release_lock,
    write_bytes,
    write_json,
    writing,
)
from tomoscope.findings.finding import Finding
from tomoscope.findings.manifest import SCHEMA, ExamRecord, Manifest, differences, read_json, read_manifest
from tomoscope.findings.tables import finding_row, read_parquet, to_parquet

FREE_BYTES = 32 << 20  # a run that starts with less free space than this will not end well


class Ledger:
    """A run's folder. `Ledger.open(folder)` reads; `Ledger.create(folder, manifest)` writes and resumes."""

    def __init__(self, folder: Path, manifest: Manifest, *, lock: int | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path) -> Ledger:
        """Open a run for reading. Raises LedgerError where there is none, or one of a newer schema."""
        path = Path(folder)
        if not path.exists():
            raise LedgerError(f"There is no run at {path}.", remedy="`tomoscope scan --out FOLDER` makes one.")
        return cls(path, read_manifest(path))

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest, *, force: bool = False) -> Ledger:
        """Open a run for writing: a new one in an empty or absent folder, or the same run to be resumed.

        `force` clears a former run (only files that are a ledger's own). Raises LedgerError, before anything is
        written, for a folder with other contents or another run, a file in its place, no permission, too little space
        and a run that another process is writing.
        """
        path = Path(folder)
        with writing(path):
            if path.exists() and not path.is_dir():
                raise LedgerError(f"{path} is a file, not a folder.", remedy="Give another folder with --out.")
            path.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(path)
        try:
            ledger = cls._prepare(path, manifest, lock, force)
        except BaseException:
            release_lock(path, lock)
            raise
        return ledger

    @staticmethod
    def check(folder: str | Path) -> None:
        """Whether a run could be written here, before a model is opened for it; writes nothing.

        Raises LedgerError for a file in its place, no permission, and too little space.
        """
        path = Path(folder).absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise ledger_error(path, NotADirectoryError(errno.ENOTDIR, "Not a directory"))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ledger_error(path, PermissionError(errno.EACCES, "Permission denied"))
        _enough_space(existing)

    @classmethod
    def _prepare(cls, path: Path, manifest: Manifest, lock: int, force: bool) -> Ledger:
        _enough_space(path)
        others = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
        if not (path / "manifest.json").exists():
            if others and not all(name.endswith(".part") for name in others):
                raise LedgerError(
                    f"{path} holds other files ({', '.join(others[:3])}) and no run.", remedy="Give an empty folder."
                )
        elif force:
            _clear(path)
        else:
            former = read_manifest(path)
            if former.identity() != manifest.identity():
                raise LedgerError(
                    f"{path} holds another run ({differences(former, manifest)}).",
                    remedy="Give another folder with --out, or --force to replace that run.",
                )
            manifest = manifest.model_copy(update={"started": former.started})
        ledger = cls(path, manifest, lock=lock)
        ledger._compact()
        ledger.update(status="running", correction="", finished="")
        return ledger

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock; reading goes on working."""
        if self._lock is not None:
            release_lock(self.folder, self._lock)
            self._lock = None

    # -- writing ------------------------------------------------------------------------------------------------

    def update(self, **changes: Any) -> None:
        """Rewrite the manifest with the named fields changed."""
        self._writable()
        unknown = set(changes) - set(Manifest.model_fields)
        if unknown:
            raise LedgerError(f"A manifest has no field {sorted(unknown)[0]!r}.", remedy="See Manifest.")
        self.manifest = self.manifest.model_copy(update=changes)
        write_json(self.folder / "manifest.json", self.manifest.model_dump(mode="json"))

    def record(
        self,
        exam: ExamRecord,
        findings: Sequence[Finding],
        *,
        arrays: Mapping[str, np.ndarray] | None = None,
        tables: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        error: str = "",
    ) -> None:
        """Write a whole exam: arrays, tables and error first, then its findings, then the mark that it is whole."""
        self._writable()
        folder = self._exam_folder(exam.exam)
        with writing(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        try:
            if arrays:
                from safetensors.numpy import save

                write_bytes(folder / "arrays.safetensors", save({name: arrays[name] for name in sorted(arrays)}))
            for name, columns in (tables or {}).items():
                write_bytes(folder / f"{_safe(name)}.parquet", to_parquet(columns))
            if error:
                write_bytes(folder / "error.txt", error.encode("utf-8", "backslashreplace"))
            append_lines(self.folder / "findings.jsonl", [_line(finding, version=1) for finding in findings])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        exam = exam.model_copy(update={"findings": tuple(finding.id for finding in findings)})
        write_json(folder / "done.json", exam.model_dump(mode="json"))

    def revise(self, findings: Sequence[Finding], *, why: str) -> None:
        """Append a new version of each finding, with the reason; the former versions stay."""
        self._writable()
        versions = {key: len(lines) for key, lines in self._lines().items()}
        lines = [_line(item, version=versions.get(item.id, 0) + 1, why=why) for item in findings]
        append_lines(self.folder / "findings.jsonl", lines)

    def _writable(self) -> None:
        if self._lock is None:
            raise LedgerError(
                f"The run at {self.folder} is open for reading only.", remedy="Use Ledger.create to write."
            )

    def _exam_folder(self, exam: str) -> Path:
        return self.folder / "exams" / _safe(exam)

    def _compact(self) -> None:
        """Before resuming: drop a cut-off last line, unfinished exams, corrections, and exams to be run again."""
        for exam, record in self.exams().items():
            if record.status in ("failed", "skipped"):
                shutil.rmtree(self._exam_folder(exam), ignore_errors=True)
        path = self.folder / "findings.jsonl"
        if path.exists():
            whole = {key for record in self.exams().values() for key in record.findings}
            firsts = {key: lines[0] for key, lines in self._lines().items() if key in whole}
            kept = [_dump(line) + "\n" for line in firsts.values()]
            write_bytes(path, "".join(kept).encode())

    # -- reading ------------------------------------------------------------------------------------------------

    def exams(self) -> dict[str, ExamRecord]:
        """The exams that are whole, by name, in the protocol's order."""
        records = {}
        with contextlib.suppress(FileNotFoundError):
            for path in (self.folder / "exams").iterdir():
                mark = path / "done.json"
                if mark.is_file():
                    record = ExamRecord.model_validate(read_json(mark))
                    records[record.exam] = record
        order = {item.get("name"): place for place, item in enumerate(self.manifest.protocol.get("exams", []))}
        return dict(sorted(records.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))

    def findings(self, *, exam: str | None = None) -> list[Finding]:
        """The newest version of each finding, in the protocol's order; one exam's with `exam`."""
        lines = self._lines()
        found = []
        for name, record in self.exams().items():
            if exam is None or name == exam:
                found += [_finding(lines[key][-1], self.folder) for key in record.findings if key in lines]
        return found

    def finding(self, id: str) -> Finding:
        """One finding by its id. Raises LedgerError with the nearest ids."""
        known = {item.id: item for item in self.findings()}
        if id not in known:
            raise LedgerError(f"The run at {self.folder} has no finding {id!r}.", remedy=nearest(id, known))
        return known[id]

    def history(self, id: str) -> list[tuple[int, str, Finding]]:
        """All versions of a finding: (version, why it was written, the finding)."""
        return [(line["version"], line["why"], _finding(line, self.folder)) for line in self._lines().get(id, [])]

    def arrays(self, exam: str) -> dict[str, np.ndarray]:
        """The arrays that an exam stored, by name; empty where it stored none."""
        path = self._exam_folder(exam) / "arrays.safetensors"
        if not path.exists():
            return {}
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LedgerError(f"{path} cannot be read: {error}.", remedy="Run the scan again with --force.") from error

    def tables(self, exam: str | None = None) -> dict[str, dict[str, list[Any]]]:
        """Tables as {"exam/name": {column: values}}, ready for a data frame; one exam's with `exam`."""
        found = {}
        for name in self.exams():
            if exam is None or name == exam:
                for path in sorted(self._exam_folder(name).glob("*.parquet")):
                    found[f"{name}/{path.stem}"] = read_parquet(path)
        return found

    def dataframe(self) -> dict[str, list[Any]]:
        """The findings as columns, one row each, ready for `pandas.DataFrame` or `pyarrow.table`; missing is None."""
        rows = [finding_row(finding) for finding in self.findings()]
        return {column: [row[column] for row in rows] for column in (rows[0] if rows else ())}

    def error(self, exam: str) -> str:
        """The traceback of an exam that failed; "" for others."""
        path = self._exam_folder(exam) / "error.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _lines(self) -> dict[str, list[dict[str, Any]]]:
        """All lines by finding id; a last line cut off by a crash is left out, another broken line is an error."""
        path = self.folder / "findings.jsonl"
        if not path.exists():
            return {}
        lines: dict[str, list[dict[str, Any]]] = {}
        raw = path.read_bytes().split(b"\n")
        for number, data in enumerate(raw, start=1):
            if not data.strip():
                continue
            try:
                line = json.loads(data)
                lines.setdefault(line["finding"]["id"], []).append(line)
            except (ValueError, KeyError, TypeError) as error:
                if number == len(raw):
                    break
                raise LedgerError(
                    f"{path} line {number} is not a finding ({error}).",
                    remedy="Remove that line, or run the scan again with --force.",
                ) from error
        return lines


def _enough_space(path: Path) -> None:
    free = shutil.disk_usage(path).free
    if free < FREE_BYTES:
        raise LedgerError(
            f"Only {free / 1e6:.0f} MB are free at {path}; a run needs at least {FREE_BYTES / 1e6:.0f} MB.",
            remedy="Free some space, or give a folder on another disk with --out.",
        )


def _line(finding: Finding, *, version: int, why: str = "") -> str:
    line = {"schema": SCHEMA, "version": version, "why": why, "finding": finding.model_dump(mode="json")}
    return _dump(line)


def _dump(line: dict[str, Any]) -> str:
    """One line of JSON, in ASCII: a token may hold half a surrogate pair, which UTF-8 cannot."""
    return json.dumps(line, ensure_ascii=True, allow_nan=False)


def _finding(line: dict[str, Any], folder: Path) -> Finding:
    try:
        return Finding.model_validate(line["finding"])
    except ValidationError as error:
        raise LedgerError(
            f"A finding of the run at {folder} does not fit the schema: {error.errors()[0]['msg']}.",
            remedy="It was written by another version; run the scan again with --force.",
        ) from error


def _safe(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,99}", name) or ".." in name:
        raise LedgerError(
            f"{name!r} cannot name an exam, a table or an array's file.",
            remedy="Use lower-case letters, digits, '_', '-' and '.'.",
        )
    return name


def _clear(path: Path) -> None:
    with writing(path):
        for name in ("findings.jsonl", "report.html", "manifest.json"):
            (path / name).unlink(missing_ok=True)
        if (path / "exams").is_dir():
            shutil.rmtree(path / "exams")
