"""`tomoscope watch`: learn what is normal inside a model from trusted inputs, and flag others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

SHOWN = 10


@told
def watch(
    trusted: Annotated[Path, typer.Option("--trusted", help="Inputs that are known to be fine, one a line.")],
    inputs: Annotated[Path, typer.Option("--inputs", help="Inputs to look at, one a line.")],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    rate: Annotated[float, typer.Option("--rate", help="Share of trusted inputs that may be flagged.")] = 0.05,
    site: Annotated[list[str] | None, typer.Option("--site", help="Sites; every block's output by default.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the trusted inputs' parts.")] = 0,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for what was found.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Flag inputs on which something unusual happens inside the model.

    What is usual is learned from trusted inputs alone; each other input gets its place among further trusted ones.
    """
    from tomoscope.exams.files import read_lines
    from tomoscope.exams.watching import watch_texts
    from tomoscope.findings.files import write_json, writing

    fine, others = read_lines(trusted), read_lines(inputs)
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        found = watch_texts(
            subject, fine, others, rate=rate, sites=site or ("layer.*.resid_post",), seed=seed
        )  # fmt: skip
    document = found.document()
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        write_json(output / "found.json", document)
        common.err().print(Text.assemble("written: ", (str(output / "found.json"), "bold")), soft_wrap=True)
    if as_json:
        common.print_json(document)
        return
    console, share = common.out(), document["share_flagged"]
    console.print(
        f"{document['flagged']} of {document['n']} inputs flagged ({share['value']:.1%} [{share['low']:.1%}, "
        f"{share['high']:.1%}]); at most {rate:.1%} of trusted ones would be.",
        style="bold", soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("p", "seen by", "input"):
        table.add_column(name, overflow="fold")
    flagged = sorted((item for item in document["items"] if item["flagged"]), key=lambda item: -item["score"])
    for item in flagged[:SHOWN]:
        table.add_row(f"{item['p_value']:.2g}", item["seen_by"], common.plain(item["text"]))
    console.print(table)
    if len(flagged) > SHOWN:
        console.print(f"... and {len(flagged) - SHOWN} more (--json or --out gives all).", soft_wrap=True)
    by = Counter(item["seen_by"] for item in flagged).most_common(3)
    if by:
        console.print(Text("seen by: " + ", ".join(f"{name} ({count})" for name, count in by)), soft_wrap=True)
