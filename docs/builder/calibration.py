"""The calibration's page: the table that ships with the package, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.prose import escape


def page() -> str:
    """The table as Markdown; what was not measured says why."""
    from tomoscope.exams import EXAMS
    from tomoscope.exams.calibration import TRUTHS, calibration_of, shipped_calibration
    from tomoscope.findings.calibration import said_share

    table = shipped_calibration()
    out = [
        "# Calibration",
        "How often each exam is right on models whose answer is known. How to read it, and how to make it: "
        "[calibration](../calibration.md). Numbers are shares with 95 % intervals over specimens.",
    ]
    if not table.rows:
        return "\n\n".join([*out, "No calibration ships with this version: every exam is uncalibrated."])
    made = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    out.append(
        f"Preset `{table.preset}`, {table.seeds} seeds, p-values of a specimen corrected by {table.correction}; {made}."
    )
    rows = ["| exam | claims | finds | silent on nulls | right place | ROC area | not measured: planted, nulls |"]
    rows.append("|" + "---|" * 7)
    for row in table.rows:
        finds, silent = (
            f"{tally.right} of {tally.claims}: {said_share(share)}" if share.value is not None else "–"
            for tally, share in ((row.planted, row.sensitivity), (row.nulls, row.specificity))
        )
        place, area = (said_share(one) if one.value is not None else "–" for one in (row.located, row.area))
        apart = f"{row.planted.not_measured}, {row.nulls.not_measured}"
        cells = [f"`{row.exam}`", row.kind or "all", finds, silent, place, area, apart]
        rows.append(f"| {' | '.join(cells)} |")
    out.append("\n".join(rows))
    out += _missing(table) + _doubts(table) + _sources(table) + _cost(table)
    stale = [name for name in table.exams if name in EXAMS and calibration_of(EXAMS[name]).status == "stale"]
    never = [name for name in EXAMS if name in TRUTHS and table.row(name) is None]
    for said, names in (("Stale (another version of the rule or options)", stale), ("Never run", never)):
        if names:
            out.append(f"{said}: {', '.join(f'`{name}`' for name in names)}.")
    return "\n\n".join([*out, *_known_circuits()])


KNOWN = Path(__file__).resolve().parents[1] / "known_circuits.json"
SAID = {
    "zero": "exact, zero", "paired": "exact, paired", "ACDC": "ACDC, paired", "EAP": "EAP",
    "EAP-IG-inputs": "EAP-IG, inputs", "EAP-IG-activations": "EAP-IG, activations",
}  # fmt: skip


def _known_circuits() -> list[str]:
    """How each way to score edges ranks those of compiled programs, by docs/known_circuits.py."""
    rows = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else []
    if not rows:
        return []
    out = [
        "## Circuits that are known edge by edge",
        "Area under the ROC curve of the edges of compiled programs (the worst of the seeds; 1 is every edge of the "
        "circuit above every other), and after it the overlap (Jaccard index) of circuits found on resampled pairs. "
        "What is counted, and how many points of the path EAP-IG takes: "
        "`tomoscope.exams.calibration.known_circuits`. Made by `python docs/known_circuits.py`.",
        "| program (edges; true ones) | " + " | ".join(SAID.values()) + " |\n|" + "---|" * (len(SAID) + 1),
    ]
    for program in dict.fromkeys(row["program"] for row in rows):
        mine = [row for row in rows if row["program"] == program]
        first = next(row for row in mine if row["method"] == "zero")
        cells = [f"{program.removeprefix('compiled_').replace('_', ' ')} ({first['edges']:,}; {first['known']})"]
        for method in SAID:
            found = [row for row in mine if row["method"] == method]
            overlaps = [row["overlap"] for row in found if row["overlap"] is not None]
            area = f"{min(row['area'] for row in found):.3f}" if found else "not measured"
            cells.append(area + (f", {sum(overlaps) / len(overlaps):.2f}" if overlaps else ""))
        out[-1] += f"\n| {' | '.join(cells)} |"
    out.append(
        "A gradient at one point (EAP) misses edges into steps, which are flat there; integrated over enough points "
        "it does not, unless both ends of the path lie on one side of a step."
    )
    return out


def _missing(table: Any) -> list[str]:
    lines = []
    for row in table.rows:
        name = f"`{row.exam}`{f' ({row.kind})' if row.kind else ''}"
        for what, share in (("sensitivity", row.sensitivity), ("specificity", row.specificity)):
            if share.value is None:
                lines.append(f"- {name}: {what} not measured, because {escape(share.missing)}.")
    return ["## What no phantom decides", "\n".join(lines)] if lines else []


def _doubts(table: Any) -> list[str]:
    lines = [
        f"- `{row.exam}`{f' ({row.kind})' if row.kind else ''}: {escape(concern)}."
        for row in table.rows
        for concern in row.concerns()
    ]
    return ["## Exams that do badly", "\n".join(lines)] if lines else []


def _sources(table: Any) -> list[str]:
    rows = ["| phantom | | with | without | could not be made |", "|---|---|---|---|---|"]
    for name, source in table.sources.items():
        rows.append(f"| `{name}` | {escape(source.title)} | {source.planted} | {source.null} | {source.failed or ''} |")
    return ["## Specimens", "\n".join(rows)]


def _cost(table: Any) -> list[str]:
    rows = ["| exam | runs | seconds, median | seconds, most | peak memory |", "|---|---|---|---|---|"]
    for name, cost in table.cost.items():
        memory = f"{cost.peak_memory_bytes / 1e9:.2f} GB" if cost.peak_memory_bytes else "–"
        rows.append(f"| `{name}` | {cost.runs} | {cost.seconds_median:.1f} | {cost.seconds_max:.1f} | {memory} |")
    words = (
        "One run of an exam on one specimen; what exams of a task share (prompts made and scored) falls on the first."
    )
    return ["## Cost", words, "\n".join(rows)]
