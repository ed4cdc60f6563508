"""`tomoscope circuit`: find the circuit of a task, or of pairs of one's own, and say how well it is proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from tomoscope.exams.circuit_run import CircuitRun

SHOWN = 60


@told
def circuit(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    task: Annotated[
        str, typer.Option("--task", "-t", help="ioi, greater_than, induction, ...", show_default=False)
    ] = "",
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", help="A .json or .jsonl file of clean and corrupted prompts.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=4, help="Pairs of a task.")] = 64,
    method: Annotated[
        str, typer.Option("--method", help="EAP-IG-inputs, EAP-IG-activations, EAP, exact, ACDC, edge-pruning, ...")
    ] = "EAP-IG-inputs",
    metric: Annotated[str, typer.Option("--metric", help="auto, logit-difference, probability, kl.")] = "auto",
    edges: Annotated[
        int | None, typer.Option("--edges", min=1, help="Edges to take, instead of the target.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", min=0.0, help="Of ACDC.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of integrated gradients.")] = 5,
    target: Annotated[
        float, typer.Option("--target", min=0.01, max=0.99, help="Share of the behaviour that the circuit is to keep.")
    ] = 0.8,
    draws: Annotated[int, typer.Option("--draws", min=4, help="Random circuits of each control.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the pairs, halves and controls.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for the circuit and its proof.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Find which edges between heads and MLPs carry a task's answer, and measure them on other prompts.

    The circuit is found on half of the pairs and measured on the other half, beside random circuits of its size, itself
    with other heads, and what the same method finds on an untrained model.
    """
    from tomoscope.exams.circuit_run import find_circuit, make_pairs

    console = common.err()
    if output is not None and output.exists() and not output.is_dir():
        from tomoscope.errors import DataError

        raise DataError(f"{output} is a file, not a folder.", remedy="Give another --out.")
    console.print(Text.assemble(("tomoscope ", "bold"), f"opens {model or 'the embedded model'} ..."))
    subject = common.open_subject(model, device=device, dtype=dtype)
    with common.quiet_stdout():
        made = make_pairs(subject, task=task, file=pairs or "", n=n, seed=seed)
        found = find_circuit(
            subject, made, method=method, metric=metric, edges=edges, threshold=threshold, steps=steps, target=target,
            draws=draws, seed=seed, progress=lambda text: console.print(Text(f"  {text}", style="dim")),
        )  # fmt: skip
        paths = [] if output is None else found.save(output)
    if as_json:
        common.print_json(found.document() | {"files": [str(path) for path in paths]})
        return
    print_circuit(common.out(), found)
    for path in paths:
        common.out().print(Text.assemble("written: ", (str(path), "bold")), soft_wrap=True)


def print_circuit(console: Console, found: CircuitRun) -> None:
    """The circuit, its share beside the controls, its areas, and its edges."""
    proof, document = found.proof, found.document()
    mine = proof.circuit
    console.print(Text(f"{common.plain(found.name)}, {common.plain(found.model)}", style="bold"))
    console.print(
        f"{mine.n_edges:,} of {mine.graph.n_edges:,} edges, {mine.n_nodes} of {len(mine.graph.sources)} nodes; "
        f"found on {found.found} pairs, measured on {found.measured} others",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("share of the behaviour kept", "", "95 % interval or range of draws"):
        table.add_column(name)
    for name, row in document["share"].items():
        known = None not in (row["value"], row["low"], row["high"])
        cells = (f"{row['value']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]") if known else ("not defined", "")
        table.add_row(name, *cells)
    console.print(table)
    areas = proof.curve.areas()
    console.print(Text(f"over sizes: CMD {areas.cmd}, on a log axis {areas.log_cmd}; CPR {areas.cpr}"), soft_wrap=True)
    console.print(Text(f"metric: {proof.told.metric}; {proof.told.choices}", style="dim"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    lines = str(mine).splitlines()[1:]
    for line in lines[:SHOWN]:
        console.print(Text(common.plain(line)), soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(Text(f"... and {len(lines) - SHOWN} more; --json or --out gives all.", style="dim"))
