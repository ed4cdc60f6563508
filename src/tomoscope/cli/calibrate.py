"""`tomoscope calibrate`: how far each exam can be believed, by models whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tomoscope.findings import CalibrationTable, Estimate


@told
def calibrate(
    exams: Annotated[
        list[str] | None,
        typer.Option("--exams", help="Only these exams: names or patterns, by commas or repeated.", show_default=False),
    ] = None,
    phantoms: Annotated[
        list[str] | None,
        typer.Option("--phantoms", help="Only these phantoms: names or patterns, by commas or repeated."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Specimens of each phantom and null; as the preset says by default."),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="quick, standard or deep: the exams' options, seeds, phantoms.")
    ] = "standard",
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder; the same folder goes on with what was stopped."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another calibration in the folder.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Run each exam on models whose answer is known and on their nulls, and say how often it is right.

    Writes calibration.json into the folder: sensitivity, specificity, right places and ROC area with intervals, and
    cost, for each exam and kind of claim. Ctrl-C keeps what is done; the same command goes on from there.
    """
    from tomoscope.cli.calibrating import Progress
    from tomoscope.exams.calibration import calibrate as run
    from tomoscope.exams.calibration import plan_calibration

    wanted: dict[str, Any] = {
        "exams": _listed(exams), "phantoms": _listed(phantoms), "seeds": seeds, "preset": preset,
    }  # fmt: skip
    plan_calibration(**wanted)
    folder = output or Path("runs", f"calibration-{preset}")
    console = common.err()
    with common.terminable(), common.quiet_stdout():
        try:
            with Progress(console) as watcher:
                table = run(folder, **wanted, force=force, watcher=watcher)
        except KeyboardInterrupt as stop:
            console.print(Text(f"{common.word(stop)}. What is done is kept in {folder}.", style="yellow"))
            console.print(Text(f"To go on: {common.again(folder)}"), soft_wrap=True)
            raise typer.Exit(common.exit_code(stop)) from None
    if as_json:
        common.print_json(table.model_dump(mode="json") | {"path": str(folder / "calibration.json")})
        return
    print_table(common.out(), table)
    common.out().print(Text.assemble("\nThe table: ", (str(folder / "calibration.json"), "bold")), soft_wrap=True)


def print_table(console: Console, table: CalibrationTable) -> None:
    """The rows of a calibration, kinds of claims under their exam, and what a reader must know of each."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("exam", "finds", "silent on nulls", "right place", "ROC area", "time"):
        shown.add_column(name, no_wrap=True)
    for row in table.rows:
        cost = table.cost.get(row.exam)
        shown.add_row(
            Text(f"  {row.kind}" if row.kind else row.exam, style="" if row.kind else "bold"),
            _counted(row.planted.right, row.planted.claims, row.sensitivity),
            _counted(row.nulls.right, row.nulls.claims, row.specificity),
            _share(row.located), _share(row.area), "" if row.kind or cost is None else f"{cost.seconds_median:.1f} s",
        )  # fmt: skip
    console.print(shown, width=max(console.width, 120), crop=False)  # numbers torn over lines can't be read
    doubts = [(row, concern) for row in table.rows for concern in row.concerns()]
    if doubts:
        console.print(Text("\nTo know before believing:", style="bold yellow"))
    for row, concern in doubts:
        console.print(Text(f"  {row.exam}{f' ({row.kind})' if row.kind else ''}: {concern}"))
    failed = {name: source.failed for name, source in table.sources.items() if source.failed}
    for name, count in failed.items():
        console.print(Text(f"  {count} specimen(s) of {name} could not be made (see lines.jsonl)", style="red"))


def _counted(right: int, claims: int, share: Estimate) -> Text:
    if share.value is None:
        return Text("–", style="dim")
    return Text(f"{right}/{claims} {_interval(share)}")


def _share(share: Estimate) -> Text:
    return Text("–", style="dim") if share.value is None else Text(f"{share.value:.2f} {_interval(share)}")


def _interval(share: Estimate) -> str:
    return "" if share.low is None else f"[{share.low:.2f}, {share.high:.2f}]"


def _listed(texts: Sequence[str] | None) -> list[str]:
    """Names given by commas, repeated, or both."""
    return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]
