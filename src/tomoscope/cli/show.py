"""`tomoscope show`: what a run found, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tomoscope.findings import Finding, Ledger

STYLES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow", "not measured": "dim"}
MARKS = {"confirmed": "●", "refuted": "✕", "inconclusive": "◐", "not measured": "○"}


@told
def show(
    run: Annotated[Path, typer.Argument(help="The folder that `tomoscope scan` wrote.")],
    finding: Annotated[
        str | None, typer.Option("--finding", help="One finding by its id, with all its evidence.")
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show what a run found: the findings by verdict, or one of them whole."""
    from tomoscope.cli.scan import run_document
    from tomoscope.findings import Ledger

    ledger = Ledger.open(run)
    if finding is not None:
        found = ledger.finding(finding)
        if as_json:
            versions = [
                {"version": version, "why": why, "verdict": item.verdict, "p_adjusted": item.p_adjusted}
                for version, why, item in ledger.history(finding)
            ]
            common.print_json(found.model_dump(mode="json") | {"history": versions})
        else:
            print_finding(common.out(), found)
        return
    if as_json:
        common.print_json(run_document(ledger))
        return
    console = common.out()
    _print_header(console, ledger)
    print_findings(console, ledger.findings())


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """The findings grouped by verdict, one line each; claims are printed as they are, without markup."""
    for verdict, style in STYLES.items():
        group = [finding for finding in findings if finding.verdict == verdict]
        if not group:
            continue
        console.print(Text(f"{MARKS[verdict]} {verdict}  {len(group)}", style=f"bold {style}"))
        if verdict == "not measured":
            _print_causes(console, group)
            continue
        for finding in group:
            console.print(Padding(Text(common.plain(finding.claim)), (0, 0, 0, 2)))
            told = f"{common.plain(_numbers(finding))}  ({finding.id})"
            console.print(Padding(Text(told, style="dim"), (0, 0, 0, 4)))
            style = "yellow" if finding.calibration.doubtful else "dim"
            console.print(Padding(Text(common.plain(finding.calibration), style=style), (0, 0, 0, 4)))
    if not findings:
        console.print(Text("The run has no findings yet.", style="dim"))


def _print_causes(console: Console, findings: Sequence[Finding]) -> None:
    """What was not measured, by its cause: one claim with its reason, or a reason with its claims' ids."""
    from tomoscope.scan.articles import by_cause

    for reason, some in by_cause(findings).items():
        alone = len(some) == 1
        head = some[0].claim if alone else f"{len(some)} claims: {reason}"
        ids = ", ".join(finding.id for finding in some)
        tail = f"{reason}  ({ids})" if alone else f"({ids})"
        console.print(Padding(Text(common.plain(head)), (0, 0, 0, 2)))
        console.print(Padding(Text(common.plain(tail), style="dim"), (0, 0, 0, 4)))


def print_finding(console: Console, finding: Finding) -> None:
    """One finding with all its evidence."""
    console.print(Text(f"{MARKS[finding.verdict]} {finding.verdict}", style=f"bold {STYLES[finding.verdict]}"))
    console.print(Text(common.plain(finding.claim), style="bold"))
    rows: list[tuple[str, Any]] = [
        ("why", finding.reason),
        ("rule", finding.rule),
        ("estimate", f"{finding.estimate} (n = {finding.estimate.n}; {finding.estimate.method})"),
    ]
    rows += [(f"control: {item.name}", f"{item.estimate}. {item.description}") for item in finding.controls]
    rows += [
        ("p", _p_values(finding)),
        ("sites", ", ".join(finding.sites)),
        ("positions", finding.positions),
        ("chosen on", _data(finding.chosen_on)),
        ("measured on", _data(finding.measured_on)),
        ("how", finding.method),
        ("calibration", str(finding.calibration)),
        ("reproduce", finding.reproduce),
    ]
    for name, value in rows:
        if value:
            console.print(Text.assemble((f"{common.plain(name):>14}  ", "dim"), common.plain(value)), soft_wrap=True)


def _print_header(console: Console, ledger: Ledger) -> None:
    manifest = ledger.manifest
    name = common.plain(manifest.provenance.model.get("name", "a model"))
    console.print(
        Text.assemble((name, "bold"), f"  protocol {manifest.protocol.get('name', '')}, seed {manifest.seed}")
    )
    console.print(
        Text(f"{manifest.status}; {manifest.correction or 'not corrected yet'}; {ledger.folder}\n", style="dim")
    )


def _numbers(finding: Finding) -> str:
    parts = [str(finding.estimate)]
    parts += [f"{item.name} {item.estimate}" for item in finding.controls[:1]]
    if finding.p_value is not None:
        parts.append(_p_values(finding))
    return "; ".join(parts)


def _p_values(finding: Finding) -> str:
    from tomoscope.findings import format_number

    if finding.p_value is None:
        return ""
    if finding.p_adjusted is None:
        return f"p = {format_number(finding.p_value, digits=2)}, not corrected yet"
    return f"p = {format_number(finding.p_value, digits=2)}, corrected {format_number(finding.p_adjusted, digits=2)}"


def _data(note: Any) -> str:
    return f"{note.name}{f' (n = {note.n})' if note.n is not None else ''}"
