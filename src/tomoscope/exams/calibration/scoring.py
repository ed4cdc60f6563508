"""What exams found against what the cards say: sensitivity, specificity, places, ROC area, by exam and kind of claim.

A claim counts as found where it was confirmed after correction over all claims about its specimen, as in a scan; a true
claim that was not measured, or whose exam failed, counts as missed, and a false one as silence: both are counted apart.
What an exam says it does not apply to counts neither way, and its number stands in the row. A claim that is true of one
place alone (a head's role) must name it. Places are scored besides: right place among those confirmed.

**Evidence**, for the ROC area, is how far the nearer end of the estimate's interval lies beyond the strongest control,
in the rule's own unit (its declared minimum): above 0 the interval excludes the control, at 1 even its low end is an
effect worth claiming. It grows with the effect and with the certainty, as the rule does, while a p-value stops at what
its resamples allow and calls a tiny effect on many prompts strong. What was not measured has the lowest evidence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tomoscope.exams.calibration.runner import VERSIONS, Line, Plan
from tomoscope.exams.calibration.truth import NOT_CLAIMS, Expected, Truth, truth_of
from tomoscope.exams.exam import Exam, Options
from tomoscope.findings.calibration import CalibrationRow, CalibrationTable, Cost, SourceCount, Tally
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.finding import Finding
from tomoscope.findings.provenance import package_versions
from tomoscope.findings.roc import clustered_share, roc_interval
from tomoscope.findings.verdict import correct

CORRECTION = "holm"


@dataclass(frozen=True)
class Outcome:
    """One claim whose truth is known, and what the exam said."""

    case: str
    specimen: str
    exam: str
    expected: Expected
    finding: Finding | None
    """None where the exam said nothing (it failed, or did not apply)."""
    status: str = "done"
    """Of the line."""
    again: bool = False
    """Whether the same claim about the same specimen was met before, under another phantom's name: it counts once."""

    @property
    def kind(self) -> str:
        """The kind of claim."""
        return self.expected.kind

    @property
    def source(self) -> str:
        """The phantom's name."""
        return self.case.split("/")[0]

    @property
    def measured(self) -> bool:
        """Whether the exam gave a number."""
        return self.finding is not None and self.finding.verdict != "not measured"

    @property
    def place(self) -> bool | None:
        """Whether a right place was named; None where none is known, or nothing was said."""
        return None if self.finding is None else self.expected.right(self.finding.sites, self.finding.positions)

    @property
    def confirmed(self) -> bool:
        """Whether the claim counts as made: confirmed, and of a right place where it is true of that alone."""
        if self.finding is None or self.finding.verdict != "confirmed":
            return False
        return not (self.expected.holds and self.expected.named and self.place is False)

    @property
    def score(self) -> float:
        """The evidence for the claim; the lowest where nothing was measured, or a wrong place was named."""
        if self.finding is None or (self.expected.holds and self.expected.named and self.place is False):
            return -math.inf
        return evidence(self.finding)


def evidence(finding: Finding) -> float:
    """How far the nearer end of the interval lies beyond the strongest control, in units of the rule's minimum."""
    estimate, rule = finding.estimate, finding.criterion
    if estimate.value is None or rule is None or finding.verdict == "not measured":
        return -math.inf
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    known = [one.estimate.value for one in finding.controls if one.estimate.value is not None]
    references = [rule.reference] if rule.reference is not None else known
    if not references:
        return -math.inf
    beyond = {
        "greater": lambda: low - max(references),
        "less": lambda: min(references) - high,
        "different": lambda: min(max(low - one, one - high) for one in references),
    }[rule.direction]()
    return beyond / (rule.minimum or 1.0)


def outcomes(lines: Iterable[Line]) -> list[Outcome]:
    """Every claim whose truth is known, with its verdict after correction over all claims about its specimen."""
    by_case: dict[str, list[Line]] = {}
    for line in lines:
        if line.exam:
            by_case.setdefault(line.case, []).append(line)
    found, met = [], set()
    for case, some in by_case.items():
        judged = {one.id: one for one in correct([f for line in some for f in line.findings], method=CORRECTION)}
        for line in some:
            for expected in line.expected:
                finding = judged.get(f"{line.exam}/{expected.key}")
                mark = (line.specimen, case.rsplit("/", 1)[1], line.exam, expected)
                found.append(Outcome(case, line.specimen, line.exam, expected, finding, line.status, mark in met))
                met.add(mark)
    return found


def score(plan: Plan, lines: Sequence[Line]) -> CalibrationTable:
    """The table of a calibration."""
    known = outcomes(lines)
    rows = [row for exam, options in plan.exams for row in _rows(exam, options, known, lines)]
    return CalibrationTable(
        preset=plan.preset, seeds=plan.seeds, correction=CORRECTION, exams=tuple(exam.name for exam, _ in plan.exams),
        versions=package_versions(VERSIONS), sources=_sources(plan, lines), rows=tuple(rows), cost=_cost(lines),
    )  # fmt: skip


def _rows(exam: Exam, options: Options, known: Sequence[Outcome], lines: Sequence[Line]) -> list[CalibrationRow]:
    """The exam's row, and one for each kind where its claims are of several."""
    truth = truth_of(exam)
    mine = [one for one in known if one.exam == exam.name]
    decided = {(one.case, f"{exam.name}/{one.expected.key}") for one in mine}
    kinds: dict[str, int] = dict.fromkeys([*(one.kind for one in mine), *(truth.unknowable if truth else ())], 0)
    for line in lines:
        for finding in line.findings if line.exam == exam.name else ():
            key = finding.id.removeprefix(f"{exam.name}/")
            if key not in NOT_CLAIMS and (line.case, finding.id) not in decided:
                kind = truth.kind(key) if truth else ""
                kinds[kind] = kinds.get(kind, 0) + 1
    made = [_row(exam, options, truth, "", mine, sum(kinds.values()))]
    if set(kinds) - {""}:
        made += [
            _row(exam, options, truth, kind, [one for one in mine if one.kind == kind], undecided)
            for kind, undecided in kinds.items()
        ]
    return made


def _row(
    exam: Exam, options: Options, truth: Truth | None, kind: str, known: Sequence[Outcome], undecided: int
) -> CalibrationRow:
    once = [one for one in known if not one.again]
    asked = [one for one in once if one.status != "inapplicable"]
    true, false = ([one for one in asked if one.expected.holds is side] for side in (True, False))
    places = [one for one in true if one.finding is not None and one.finding.verdict == "confirmed"]
    placed = [one for one in places if one.place is not None]
    unknowable = truth.unknowable.get(kind) if truth else "no card speaks of this exam's claims"
    nobody = "no phantom" if len(asked) == len(once) else "no phantom, of those it applies to,"
    sources: dict[str, set[str]] = {}
    for one in (one for one in known if one.status != "inapplicable"):
        sources.setdefault(one.source, set()).add(one.specimen)
    return CalibrationRow(
        exam=exam.name, kind=kind, signature=exam.signature, options=options.model_dump(mode="json"),
        sensitivity=_share([one.confirmed for one in true], true, unknowable or f"{nobody} says that it is true"),
        specificity=_share([not one.confirmed for one in false], false, f"{nobody} says that it is false"),
        located=_share(
            [bool(one.place) for one in placed], placed,
            "none was confirmed" if any(one.expected.places or one.expected.positions for one in true)
            else "no phantom knows the place",
        ),
        area=_area(true, false), planted=_tally(true, True), nulls=_tally(false, False),
        sources={name: len(some) for name, some in sorted(sources.items())}, undecided=undecided,
        inapplicable=len(once) - len(asked),
    )  # fmt: skip


def _share(hits: Sequence[bool], about: Sequence[Outcome], missing: str) -> Estimate:
    if not hits:
        return Estimate.unknown(missing)
    return _rounded(clustered_share(hits, [one.specimen for one in about], unit=""))


def _area(true: Sequence[Outcome], false: Sequence[Outcome]) -> Estimate:
    sides = [[one.score for one in side] for side in (true, false)]
    clusters = [[one.specimen for one in side] for side in (true, false)]
    made = roc_interval(*sides, positive_clusters=clusters[0], negative_clusters=clusters[1])
    return _rounded(made.model_copy(update={"unit": ""}))


def _rounded(estimate: Estimate) -> Estimate:
    """Four decimals: the rest is noise, and the file stays the same on machines that round differently."""
    changes = {
        key: round(value, 4) for key in ("value", "low", "high") if (value := getattr(estimate, key)) is not None
    }
    return estimate.model_copy(update=changes)


def _tally(some: Sequence[Outcome], holds: bool) -> Tally:
    return Tally(
        specimens=len({one.specimen for one in some}), claims=len(some),
        right=sum(one.confirmed is holds for one in some), not_measured=sum(not one.measured for one in some),
        failed=sum(one.status == "failed" for one in some),
    )  # fmt: skip


def _sources(plan: Plan, lines: Sequence[Line]) -> dict[str, SourceCount]:
    made = {line.case for line in lines if line.exam}
    lost = {line.case for line in lines if not line.exam}
    found = {}
    for source in plan.sources:
        sides = {side: sum(one.split("/")[:2] == [source.name, side] for one in made) for side in ("planted", "null")}
        failed = sum(one.split("/")[0] == source.name for one in lost)
        found[source.name] = SourceCount(title=source.title, failed=failed, **sides)
    return found


def _cost(lines: Sequence[Line]) -> dict[str, Cost]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.exam and line.status != "undecided" and not line.same_as:
            found.setdefault(line.exam, []).append(line)
    return {
        exam: Cost(
            runs=len(some), seconds_median=round(statistics.median(line.seconds for line in some), 3),
            seconds_max=round(max(line.seconds for line in some), 3),
            peak_memory_bytes=max((line.peak_memory_bytes for line in some if line.peak_memory_bytes), default=None),
        )
        for exam, some in found.items()
    }  # fmt: skip
