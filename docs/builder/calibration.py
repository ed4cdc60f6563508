"""The calibration's page: the table that ships with the package, row by row."""

from __future__ import annotations

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
    return "\n\n".join(out)


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
