"""Run a protocol over a subject into a ledger.

Steps: write down the plan and the rules; run each exam that is not done yet, in order; record each as it ends; correct
all p-values for the number of claims; mark the run finished. An exam that fails, does not apply, or would start after
the budget is spent becomes a finding "not measured" with the reason, and the scan goes on. An interrupt (Ctrl-C) keeps
what is recorded; the same command resumes, and runs again what failed or was skipped.

Same subject, protocol and seed give the same findings, byte for byte; times and memory stand apart in the exams' marks.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tomoscope.errors import LedgerError, TomoscopeError
from tomoscope.exams import Context
from tomoscope.exams.calibration import calibration_of
from tomoscope.findings.finding import DataNote, Estimate, Finding
from tomoscope.findings.ledger import Ledger
from tomoscope.findings.manifest import ExamRecord, Manifest
from tomoscope.findings.provenance import collect_provenance, hash_arrays, peak_memory_bytes, reset_peak_memory
from tomoscope.findings.verdict import CORRECTION_NAMES, correct
from tomoscope.scan.protocol import Protocol, Step


class Observer:
    """What hears of a scan's progress: a terminal, a viewer, a test. This one does nothing; override what is wanted."""

    def scan_started(self, steps: Sequence[Step], done: Sequence[str]) -> None:
        """The plan, and the names of exams that a former run has done."""

    def exam_started(self, step: Step) -> None:
        """An exam begins."""

    def exam_progress(self, step: Step, done: float, total: float | None, what: str) -> None:
        """An exam has done `done` of `total` units of work."""

    def exam_finished(self, step: Step, record: ExamRecord, findings: Sequence[Finding]) -> None:
        """An exam is recorded."""

    def scan_finished(self, ledger: Ledger) -> None:
        """Everything is recorded and corrected."""


def run_scan(
    subject: Any,
    protocol: Protocol,
    steps: Sequence[Step],
    *,
    out: str | Path,
    seed: int | None = None,
    budget_seconds: float | None = None,
    base_command: str = "tomoscope scan",
    command: str = "",
    passed: Mapping[str, Any] | None = None,
    defaulted: Mapping[str, Any] | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> Ledger:
    """Run the steps (from `plan`) and return the ledger, closed for writing.

    `base_command` opens each finding's `reproduce` command ("tomoscope scan MODEL --dtype float32"). `seed` and
    `budget_seconds` default to the protocol's. Raises LedgerError before the work where the folder cannot be used, and
    while recording where the disk fills; KeyboardInterrupt passes through after the manifest says so.
    """
    observer = observer or Observer()
    seed = protocol.seed if seed is None else seed
    budget = protocol.budget_seconds if budget_seconds is None else budget_seconds
    deadline = None if budget is None else time.monotonic() + budget
    listed = [{"name": step.exam.name, "options": step.options.model_dump(mode="json")} for step in steps]
    manifest = Manifest(
        protocol=protocol.model_dump(mode="json", exclude={"exams", "seed"})
        | {"budget_seconds": budget, "exams": listed},
        rules={step.exam.name: {name: rule.sentence() for name, rule in step.exam.rules.items()} for step in steps},
        seed=seed,
        provenance=collect_provenance(
            seed=seed, model=describe_model(subject), passed=passed, defaulted=defaulted, command=command,
            device=str(getattr(subject, "device", "cpu")),
        ),
        started=_now(),
    )  # fmt: skip
    with Ledger.create(out, manifest, force=force) as ledger:
        done = list(ledger.exams())
        observer.scan_started(steps, done)
        shared: dict[Any, Any] = {}
        try:
            for step in steps:
                if step.exam.name in done:
                    continue
                observer.exam_started(step)
                record, findings = _run_step(
                    step, subject, ledger, seed, base_command, deadline, budget, observer, shared
                )
                observer.exam_finished(step, record, findings)
            _finish(ledger, protocol)
        except KeyboardInterrupt:
            ledger.update(status="interrupted")
            raise
        observer.scan_finished(ledger)
    return ledger


def reproduce_command(base: str, step: Step, seed: int) -> str:
    """The command that recomputes one exam alone, with every option that differs from its default."""
    parts = [base, "--exam", step.exam.name, "--seed", str(seed)]
    for key, value in step.passed().items():
        parts += ["--option", shlex.quote(f"{step.exam.name}.{key}={_as_text(value)}")]
    return " ".join(parts)


def describe_model(subject: Any) -> dict[str, Any]:
    """The model's name, hash and facts as plain values for the record; parts a subject does not have are left out."""
    described: dict[str, Any] = {"name": str(getattr(subject, "name", type(subject).__name__))}
    for key in ("dtype", "device"):
        if hasattr(subject, key):
            described[key] = str(getattr(subject, key)).removeprefix("torch.")
    facts = getattr(subject, "facts", None)
    if dataclasses.is_dataclass(facts) and not isinstance(facts, type):
        described["facts"] = {key: _plain(value) for key, value in dataclasses.asdict(facts).items()}
    weights = getattr(getattr(subject, "model", None), "state_dict", None)
    if callable(weights):
        import torch

        tensors = ((name, tensor.detach().cpu().contiguous()) for name, tensor in weights().items())
        described["hash"] = hash_arrays(
            (f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor.reshape(-1).view(torch.uint8).numpy())
            for name, tensor in tensors
            if not tensor.is_meta
        )
    return described


def _run_step(
    step: Step,
    subject: Any,
    ledger: Ledger,
    seed: int,
    base_command: str,
    deadline: float | None,
    budget: float | None,
    observer: Observer,
    shared: dict[Any, Any],
) -> tuple[ExamRecord, list[Finding]]:
    """Run one exam and record it, whatever becomes of it."""
    exam = step.exam
    context = Context(
        subject, exam, options=step.options, scan_seed=seed, deadline=deadline, shared=shared,
        reproduce=reproduce_command(base_command, step, seed),
        report=lambda done, total, what: observer.exam_progress(step, done, total, what),
    )  # fmt: skip
    findings: list[Finding] = []
    status, error, trace = "done", "", ""
    reset_peak_memory()
    start = time.perf_counter()
    if deadline is not None and time.monotonic() >= deadline:
        status = "skipped"
        why = f"the budget of {budget:g} s was spent before this exam could start"
        findings.append(_absent(context, "budget", why))
    else:
        try:
            why = exam.applies(subject)
            if why:
                status = "inapplicable"
                findings.append(_absent(context, "applies", why))
            else:
                for finding in exam.run(context):
                    findings.append(finding)
        except LedgerError:
            raise
        except Exception as raised:  # an exam is others' code on others' models: any failure is a finding, not the end
            status, trace = "failed", traceback.format_exc()
            error = f"{type(raised).__name__}: {raised}"
            first = (str(raised) if isinstance(raised, TomoscopeError) else error).strip().split("\n")[0]
            findings.append(_absent(context, "failed", f"the exam failed: {first or type(raised).__name__}"))
    record = ExamRecord(
        exam=exam.name, status=status, title=exam.title, question=exam.question,
        options=step.options.model_dump(mode="json"), findings=tuple(finding.id for finding in findings),
        seconds=time.perf_counter() - start, peak_memory_bytes=peak_memory_bytes(), log=tuple(context.logged),
        error=error,
    )  # fmt: skip
    ledger.record(record, findings, arrays=context.arrays, tables=context.tables, error=trace)
    return record, findings


def _absent(context: Context, key: str, why: str) -> Finding:
    """What stands in the record for an exam that gave no answer."""
    exam = context.exam
    nothing = DataNote(name="nothing")
    return Finding(
        id=f"{exam.name}/{key}", exam=exam.name, claim=exam.question, estimate=Estimate.unknown(why), chosen_on=nothing,
        measured_on=nothing, rule=" ".join(rule.sentence() for rule in exam.rules.values()), verdict="not measured",
        reason=why, method=exam.method, reproduce=context.reproduce, seed=context.scan_seed,
        calibration=calibration_of(exam, key, context.options),
    )  # fmt: skip


def _finish(ledger: Ledger, protocol: Protocol) -> None:
    """Correct the p-values of the whole scan, as a new version of each finding, and close the record."""
    findings = ledger.findings()
    tested = sum(finding.p_value is not None for finding in findings)
    corrected = correct(findings, method=protocol.correction)
    name = CORRECTION_NAMES[protocol.correction]
    said = f"{name} over {tested} claim{'' if tested == 1 else 's'}" if tested else "no claim has a p-value"
    ledger.revise([new for old, new in zip(findings, corrected, strict=True) if new != old], why=said)
    notes = [note for finding in corrected for note in (finding.chosen_on, finding.measured_on) if note.hash]
    origin = ledger.manifest.provenance.model_copy(update={"data": {note.name: note.hash for note in notes}})
    ledger.update(status="finished", correction=said, finished=_now(), provenance=origin)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _as_text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """A value as JSON has it; a number that is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
