"""Run each exam on each specimen, a line at a time, so that a calibration that was killed goes on where it stopped.

    OUT/plan.json           what is to be done: exams with their options, phantoms, seeds, versions
    OUT/lines.jsonl         one line for each specimen and exam: what the card says, what the exam found, what it took
    OUT/calibration.json    the table, written whole when all is done

A specimen is examined as a scan would: the same options, one shared state, p-values corrected over all its claims. An
exam of which the card decides no claim is not run on that specimen. A model that was examined already (the same
weights, tokenizer, answers and seed, under another name) is not examined again. An exam that fails is a claim missed,
not the end; a phantom that can't be made is counted as such.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tomoscope.errors import LedgerError, ProtocolError, nearest
from tomoscope.exams.attribution_graphs import transcoders_as
from tomoscope.exams.calibration.memory import Memory
from tomoscope.exams.calibration.sources import (
    OWN_TASKS,
    Case,
    Source,
    cases,
    find_sources,
    fingerprint,
    tasks_as,
)
from tomoscope.exams.calibration.truth import Expected, truth_of
from tomoscope.exams.dead_layers import labelled_as
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.registry import EXAMS
from tomoscope.findings.calibration import Calibration, CalibrationTable
from tomoscope.findings.files import acquire_lock, append_lines, release_lock, write_bytes, write_json, writing
from tomoscope.findings.finding import Finding
from tomoscope.findings.provenance import package_versions, peak_memory_bytes, reset_peak_memory
from tomoscope.findings.record import Record
from tomoscope.phantoms import Phantom, Specimen


@dataclass(frozen=True)
class Preset:
    """How much work a calibration is."""

    exams: str
    """The exams' own preset; "" for their default options."""
    seeds: int
    phantoms: tuple[str, ...] = ()
    """Where not all of them."""


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "quick",
        2,
        ("induction_gpt2", "duplicate_gpt2", "compiled_histogram", "routed", "written", "rotated", "untrained"),
    ),
    "standard": Preset("", 6),
    "deep": Preset("deep", 30),
}
"""Name -> preset."""
VERSIONS = ("tomoscope", "torch", "transformers", "numpy", "scipy")


class Line(Record):
    """One exam on one specimen; `exam` is "" where the specimen could not be made."""

    case: str
    exam: str
    status: Literal["done", "inapplicable", "undecided", "failed"] = "done"
    error: str = ""
    specimen: str = ""
    """Hash of what makes the specimen a different one."""
    same_as: str = ""
    """The case whose model this one's is, and whose findings these are."""
    expected: tuple[Expected, ...] = ()
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    peak_memory_bytes: int | None = None


class Watcher:
    """What hears of a calibration's progress; this one does nothing."""

    def started(self, total: int, done: int) -> None:
        """`total` lines are planned, `done` of them stand already."""

    def working(self, case: Case, what: str) -> None:
        """A specimen is being made or examined."""

    def line(self, line: Line, count: int) -> None:
        """A line is written; it counts as so many of the plan's (a specimen that failed is all of its exams)."""


@dataclass(frozen=True)
class Plan:
    """What is to be done: exams with their options, specimens."""

    exams: tuple[tuple[Exam, Options], ...]
    sources: tuple[Source, ...]
    seeds: int
    preset: str

    @property
    def cases(self) -> list[Case]:
        """Every specimen, in order."""
        return cases(self.sources, self.seeds)

    def document(self) -> dict[str, Any]:
        """The plan as JSON: a folder is gone on with where this is equal."""
        exams = {
            exam.name: {"signature": exam.signature, "options": options.model_dump(mode="json")}
            for exam, options in self.exams
        }
        return {
            "preset": self.preset, "seeds": self.seeds, "phantoms": [source.name for source in self.sources],
            "exams": exams, "versions": package_versions(VERSIONS),
        }  # fmt: skip


def plan_calibration(
    *,
    exams: Sequence[str | Exam] = (),
    phantoms: Sequence[str | Phantom] = (),
    seeds: int | None = None,
    preset: str = "standard",
) -> Plan:
    """Everything that is to be done, checked by name before any work. Raises ProtocolError and DataError."""
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS) or f"There are: {', '.join(PRESETS)}."
        raise ProtocolError(f"There is no preset {preset!r} of calibration.", remedy=hint)
    chosen_preset = PRESETS[preset]
    count = chosen_preset.seeds if seeds is None else seeds
    if count < 1:
        raise ProtocolError(f"{count} seeds make no specimen.", remedy="Give 1 or more.")
    chosen: dict[str, Exam] = {}
    for name in exams or list(EXAMS):
        if isinstance(name, Exam):
            chosen[name.name] = name
            continue
        matches = [one for one in EXAMS if fnmatch.fnmatchcase(one, name)] or [EXAMS.find(name).name]
        chosen |= {one: EXAMS[one] for one in matches}
    own = chosen_preset.exams
    steps = tuple((exam, exam.configure(dict(exam.presets.get(own, {})))) for exam in chosen.values())
    return Plan(steps, tuple(find_sources(phantoms or chosen_preset.phantoms)), count, preset)


def calibrate(
    out: str | Path,
    *,
    exams: Sequence[str | Exam] = (),
    phantoms: Sequence[str | Phantom] = (),
    seeds: int | None = None,
    preset: str = "standard",
    force: bool = False,
    watcher: Watcher | None = None,
) -> CalibrationTable:
    """Run exams on phantoms and their nulls, and say how often each is right.

    Args:
        out: a folder; the same one goes on with what was stopped. It gets `calibration.json`.
        exams: names, patterns or exams of one's own; all where none is given.
        phantoms: names, patterns or phantoms of one's own; the preset's where none is given (all but for "quick").
        seeds: specimens of each phantom and null; the preset's number by default.
        preset: "quick", "standard" or "deep": the exams' own options, how many seeds, which phantoms.
        force: replace another calibration in the folder.
        watcher: hears of the progress.

    Raises:
        ProtocolError: an unknown exam or preset, before any work.
        DataError: an unknown phantom, before any work.
        LedgerError: a folder that cannot be used, or holds another calibration.
    """
    plan = plan_calibration(exams=exams, phantoms=phantoms, seeds=seeds, preset=preset)
    from tomoscope.exams.calibration.scoring import score

    with _folder(Path(out), plan, force) as folder:
        lines = run_plan(plan, folder / "lines.jsonl", watcher or Watcher())
        table = score(plan, lines)
        table.write(folder / "calibration.json")
    return table


def run_plan(plan: Plan, path: Path, watcher: Watcher) -> list[Line]:
    """Make every specimen that is not done, run every exam that is not done, and give all lines in the plan's order."""
    done = read_lines(path)
    write_bytes(path, "".join(_dump(line) + "\n" for line in done.values()).encode("ascii"))
    names = [exam.name for exam, _ in plan.exams]
    watcher.started(len(plan.cases) * len(names), sum(key[1] in names for key in done))
    with tasks_as(Memory().tasks()):
        for case in plan.cases:
            wanted = [step for step in plan.exams if (case.key, step[0].name) not in done]
            for line in _examine(case, wanted, done, watcher) if wanted else ():
                append_lines(path, [_dump(line)])
                done[line.case, line.exam] = line
                watcher.line(line, 1 if line.exam else len(names))
    order = [(case.key, name) for case in plan.cases for name in ("", *names)]
    return [done[key] for key in order if key in done]


def read_lines(path: Path) -> dict[tuple[str, str], Line]:
    """The whole lines of a file, by case and exam; what failed is left out, so that it is run again.

    Raises LedgerError for a broken line that is not the last.
    """
    found: dict[tuple[str, str], Line] = {}
    raw = path.read_bytes().split(b"\n") if path.exists() else []
    for number, data in enumerate(raw, start=1):
        if not data.strip():
            continue
        try:
            line = Line.model_validate_json(data)
        except (ValueError, ValidationError) as error:
            if number == len(raw):  # cut off by a crash
                break
            raise LedgerError(
                f"{path} line {number} is broken ({error}).", remedy="Remove it, or start again with --force."
            ) from error
        if line.status != "failed":
            found[line.case, line.exam] = line
    return found


def _examine(
    case: Case, steps: Sequence[tuple[Exam, Options]], done: Mapping[tuple[str, str], Line], watcher: Watcher
) -> Iterator[Line]:
    """One specimen under some exams."""
    watcher.working(case, "made")
    try:
        specimen = case.make()
    except Exception as error:  # others' code: a phantom that can't be made is counted, and the rest goes on
        yield Line(case=case.key, exam="", status="failed", error=_told(error))
        return
    mark, shared = fingerprint(specimen, case.key), {}
    with (
        tasks_as(specimen.data.get(OWN_TASKS, {})) as new,
        transcoders_as(specimen.data.get("transcoders")),
        labelled_as(specimen.data.get("labelled")),
    ):
        for exam, options in steps:
            watcher.working(case, exam.name)
            asked = options
            if new and "tasks" in type(options).model_fields:
                asked = exam.configure({**options.model_dump(), "tasks": (*options.model_dump()["tasks"], *new)})
            truth = truth_of(exam)
            expected = tuple(truth.expect(specimen.card, asked)) if truth else ()
            twin = _twin(done, case, exam.name, mark)
            if not expected:
                yield Line(case=case.key, exam=exam.name, status="undecided", specimen=mark)
            elif twin is None:
                yield _run(case, specimen, exam, asked, shared, expected, mark)
            else:
                yield twin.model_copy(update={"case": case.key, "same_as": twin.case, "expected": expected})


def _twin(done: Mapping[tuple[str, str], Line], case: Case, exam: str, mark: str) -> Line | None:
    """The line of another case with the same model and seed."""
    for line in done.values():
        same = line.specimen == mark and line.exam == exam and line.case.rsplit("/", 1)[1] == str(case.seed)
        if same and not line.same_as and line.status in ("done", "inapplicable"):
            return line
    return None


def _run(
    case: Case,
    specimen: Specimen,
    exam: Exam,
    options: Options,
    shared: dict[Any, Any],
    expected: tuple[Expected, ...],
    mark: str,
) -> Line:
    """One exam on one specimen, whatever becomes of it."""
    context = Context(specimen.subject, exam, options=options, scan_seed=case.seed, shared=shared)
    findings: list[Finding] = []
    status, error = "done", ""
    reset_peak_memory()
    start = time.perf_counter()
    try:
        if exam.applies(specimen.subject):
            status = "inapplicable"
        else:
            for finding in exam.run(context):
                findings.append(_trimmed(finding))
    except Exception as raised:  # as in a scan: any failure is a finding, not the end
        status, error = "failed", _told(raised)
    return Line(
        case=case.key, exam=exam.name, status=status, error=error, specimen=mark, expected=expected,
        findings=tuple(findings), seconds=time.perf_counter() - start, peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip


def _trimmed(finding: Finding) -> Finding:
    """A finding without what scoring does not need."""
    return finding.model_copy(
        update={"figures": (), "treatments": (), "method": "", "rule": "", "calibration": Calibration()}
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


def _dump(line: Line) -> str:
    """One line of JSON, in ASCII: a token may hold half a surrogate pair, which UTF-8 cannot."""
    return json.dumps(line.model_dump(mode="json", exclude_defaults=True), ensure_ascii=True, allow_nan=False)


@contextlib.contextmanager
def _folder(path: Path, plan: Plan, force: bool) -> Generator[Path]:
    """The folder, locked, with the plan in it. Raises LedgerError where it holds something else."""
    with writing(path):
        if path.exists() and not path.is_dir():
            raise LedgerError(f"{path} is a file, not a folder.", remedy="Give another folder with --out.")
        path.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(path)
    try:
        _prepare(path, plan.document(), force)
        yield path
    finally:
        release_lock(path, lock)


def _prepare(path: Path, wanted: dict[str, Any], force: bool) -> None:
    place = path / "plan.json"
    others = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
    if not place.exists():
        if others and not all(name.endswith(".part") for name in others):
            raise LedgerError(
                f"{path} holds other files ({', '.join(others[:3])}) and no calibration.",
                remedy="Give an empty folder.",
            )
    elif not force:
        try:
            former = json.loads(place.read_bytes())
        except (OSError, ValueError) as error:
            raise LedgerError(f"{place} cannot be read: {error}.", remedy="Start again with --force.") from error
        differs = [key for key in wanted if not isinstance(former, dict) or former.get(key) != wanted[key]]
        if differs:
            raise LedgerError(
                f"{path} holds another calibration (other {', '.join(differs)}).",
                remedy="Give another folder with --out, or --force to replace that one.",
            )
        return
    with writing(path):
        for name in ("lines.jsonl", "calibration.json"):
            (path / name).unlink(missing_ok=True)
    write_json(place, wanted)
