"""A whole scan as one call from Python, and its record read back: what `tomoscope scan` does, without a terminal.

    ledger = scan_model(subject, "runs/mine", protocol="quick")
    ledger = load_report("runs/mine")

Steps: load the protocol, plan it, run it, write report.html beside the record.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tomoscope.findings.ledger import Ledger
from tomoscope.scan.protocol import Protocol, load_protocol, plan
from tomoscope.scan.report import write_report
from tomoscope.scan.runner import Observer, run_scan


def scan_model(
    subject: Any,
    out: str | Path,
    *,
    protocol: str | Path | Protocol = "standard",
    only: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | None = None,
    budget_seconds: float | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> Ledger:
    """Scan a subject into a folder, write its report.html, and return the record.

    Args:
        subject: an opened model.
        out: the run's folder; the same folder, model, protocol and seed resume.
        protocol: "quick", "standard", "deep", the path of a TOML file, or a protocol.
        only: names of exams to keep.
        options: further options by exam.
        seed: instead of the protocol's.
        budget_seconds: exams that would start later are "not measured".
        force: replace a former run in the folder.
        observer: hears of the progress.

    Raises:
        ProtocolError: an unknown protocol, exam or option, before anything runs.
        LedgerError: a folder that cannot be used, before anything runs.
    """
    chosen = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    steps = plan(chosen, only=only, options=options)
    source = getattr(subject, "source", None)
    ledger = run_scan(
        subject, chosen, steps, out=out, seed=seed, budget_seconds=budget_seconds, force=force, observer=observer,
        base_command=shlex.join(["tomoscope", "scan", *([str(source)] if source else [])]),
    )  # fmt: skip
    write_report(ledger)
    return ledger


def load_report(folder: str | Path) -> Ledger:
    """The record of a run, for reading: `findings()`, `arrays(exam)`, `tables()`, `dataframe()`.

    Raises:
        LedgerError: no run there, or one that another version wrote.
    """
    return Ledger.open(folder)
