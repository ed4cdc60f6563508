"""`tomoscope plan features`: what a dictionary of any size would take, before anything is run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import JsonOption, TracebackOption, told

plan = typer.Typer(
    name="plan",
    help="What a work would take: operations, bytes, hours, money.",
    no_args_is_help=True,
    add_completion=False,
)
UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@plan.callback()
def _plan() -> None:
    pass


@plan.command("features")
@told
def plan_dictionary(
    model_params: Annotated[float, typer.Option("--model-params", help="Parameters of the model: 70e9.")],
    d_model: Annotated[int, typer.Option("--d-model", help="Width of what the dictionary reads.")],
    latents: Annotated[float, typer.Option("--latents", help="Features: 30e6.")],
    tokens: Annotated[float, typer.Option("--tokens", help="Of training: 8e9.")],
    k: Annotated[int, typer.Option("--k", help="Active features a token.")] = 64,
    depth: Annotated[float, typer.Option("--depth", help="Share of the layers that is run.")] = 1.0,
    hardware: Annotated[str, typer.Option("--hardware", help="A100-80GB, H100-SXM, H200, B200.")] = "H100-SXM",
    price: Annotated[
        float | None, typer.Option("--price", help="Dollars an hour, instead of the assumed.", show_default=False)
    ] = None,
    number: Annotated[int, typer.Option("--bytes", help="Bytes a stored number: 2 is bf16, 1 int8.")] = 2,
    dashboard_tokens: Annotated[float, typer.Option("--dashboard-tokens", help="Read for dashboards.")] = 1e8,
    labelled: Annotated[
        float | None, typer.Option("--labelled", help="Features labelled; all by default.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Say what a dictionary takes: work, bytes on disk and in memory, hours, money, each with its formula."""
    from tomoscope.features import plan_features

    made = plan_features(
        model_params=model_params, d_model=d_model, latents=latents, tokens=tokens, k=k, depth=depth, hardware=hardware,
        price=price, bytes_a_number=number, dashboard_tokens=dashboard_tokens, labelled=labelled,
    )  # fmt: skip
    if as_json:
        common.print_json({"given": made.given, "lines": [vars(line) for line in made.lines]})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "", "", "formula", "source"):
        table.add_column(heading, overflow="fold")
    group = ""
    for line in made.lines:
        head = line.group if line.group != group else ""
        group = line.group
        table.add_row(
            Text(head, style="bold"), line.what, shown(line.value, line.unit), Text(line.formula, style="dim"),
            Text(line.source, style="dim"),
        )  # fmt: skip
    common.out().print(table)


def shown(value: float, unit: str) -> str:
    """A number with its unit, short: 3.9 ZFLOP, 6.9 TB, 1,234 GPU hours."""
    if unit in ("FLOP", "bytes"):
        for size, letter in UNITS:
            if value >= size:
                return f"{value / size:.3g} {letter}{'B' if unit == 'bytes' else unit}"
    if unit == "dollars":
        return f"${value:,.0f}"
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
