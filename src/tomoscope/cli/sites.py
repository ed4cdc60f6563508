"""`tomoscope sites`: every site of a model, its axes, and why one cannot be had."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told


@told
def sites(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="One line per layer, not per kind.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """List the sites of a model: what can be read and edited, with axes; and what cannot, with the reason."""
    subject = common.open_subject(model, device=device, dtype=dtype)
    rows = site_rows(subject)
    if as_json:
        common.print_json({"model": subject.name, "sites": rows})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("site", "", "axes", "note"):
        table.add_column(heading, overflow="fold")
    for row in rows if every_layer else grouped(rows):
        state = Text("✓", style="green") if row["available"] else Text("✕", style="yellow")
        note = row["note"] if row["available"] else f"not here: {row['reason']}"
        table.add_row(Text(row["site"]), state, Text(" ".join(row["axes"]), style="dim"), Text(note))
    common.out().print(table)


def site_rows(subject: Any) -> list[dict[str, Any]]:
    """Each site with its axes, whether it is available, why not, and a note."""
    return [
        {
            "site": name,
            "axes": [str(axis) for axis in info.axes],
            "available": bool(info.available),
            "reason": str(info.reason or ""),
            "note": str(getattr(info, "note", "") or ""),
        }
        for name, info in subject.sites().items()
    ]


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sites that differ in their layer alone as one row, `layer.0-11.resid_post`."""
    groups: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for row in rows:
        match = re.match(r"^layer\.(\d+)\.(.*)$", row["site"])
        kind, layer = (match[2], match[1]) if match else (row["site"], "")
        key = (kind, bool(match), tuple(row["axes"]), row["available"], row["reason"], row["note"])
        groups.setdefault(key, []).append((layer, row))
    result = []
    for (kind, layered, *_), members in groups.items():
        site = f"layer.{_ranges([int(layer) for layer, _ in members])}.{kind}" if layered else kind
        result.append(members[0][1] | {"site": site})
    return result


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
