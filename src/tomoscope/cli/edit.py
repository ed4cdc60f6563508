"""`tomoscope trace` and `tomoscope edit`: where a fact is recalled, and another put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
PromptOption = Annotated[str, typer.Option("--prompt", help='Names the subject, or has "{}" in its place.')]
SubjectOption = Annotated[str, typer.Option("--subject", help="What the fact is about.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of noise, contexts and samples.")]


@told
def trace(
    prompt: PromptOption,
    subject: SubjectOption,
    model: ModelArgument = None,
    answer: Annotated[str, typer.Option("--answer", help="The model's first answer by default.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="What is restored: hidden, mlp, attn.")] = "mlp",
    window: Annotated[int, typer.Option("--window", min=1, help="Layers restored together (mlp, attn).")] = 1,
    draws: Annotated[int, typer.Option("--draws", min=2, help="Of the noise.")] = 10,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Trace one fact: noise on its subject takes the answer away; which restored state brings it back?"""
    from tomoscope.exams.edit_run import trace_fact

    opened = common.opened(model, device, dtype)
    with common.quiet_stdout():
        found = trace_fact(
            opened, prompt, subject, answer=answer, kind=kind, window=window, draws=draws, seed=seed
        )  # fmt: skip
    if as_json:
        common.print_json(found)
        return
    console = common.out()
    console.print(
        Text(
            f"{common.plain(found['prompt'])} ->{common.plain(found['answer'])}: probability "
            f"{found['probability']:.3f}, under noise {found['under_noise']:.3f}"
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("regained by layer")
    first, end = found["subject_tokens"]
    for layer in range(len(found["effect"][0])):
        table.add_column(str(layer), justify="right")
    for place, row in enumerate(found["effect"]):
        style = "bold" if first <= place < end else ""
        cells = [Text(f"{value:.2f}", style="bold" if value == max(map(max, found["effect"])) else "") for value in row]
        table.add_row(Text(common.plain(found["tokens"][place]), style=style), *cells)
    console.print(table)
    peak = found["peak"]
    console.print(
        Text(f"most comes back at {common.plain(peak['text'])!r} (token {peak['token']}), layer {peak['layer']}"),
        soft_wrap=True,
    )


@told
def edit(
    model: ModelArgument = None,
    prompt: Annotated[str, typer.Option("--prompt", help='Names the subject, or has "{}" in its place.')] = "",
    subject: Annotated[str, typer.Option("--subject", help="What the fact is about.")] = "",
    target: Annotated[str, typer.Option("--target", help="What the model shall say.")] = "",
    requests: Annotated[
        Path | None, typer.Option("--requests", help="Many facts: CounterFact, zsRE or our JSON.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First facts only.", show_default=False)] = None,
    method: Annotated[
        str, typer.Option("--method", help="rome, rome-paper, memit, alphaedit, ft, ft-l, lora.")
    ] = "rome",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Where to write; by default where tracing points.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help='"subject" or "last" token; by tracing by default.', show_default=False)
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text for second moments and held-out loss.", show_default=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=64, help="Of the second moments.")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Keeps second moments.", show_default=False)] = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the treatment to this file.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write a fact (or a file of facts) into a model's weights as a treatment, and say what else it changed."""
    from tomoscope.exams.edit_run import edit_facts
    from tomoscope.exams.edit_run import requests_of as read

    asked = read(requests, prompt, subject, target, limit)
    opened = common.opened(model, device, dtype)
    with common.quiet_stdout():
        treatment, document = edit_facts(
            opened, asked, method=method, layers=layer, at=at, texts=corpus, tokens=tokens, cache=cache, seed=seed
        )
        if output is not None:
            treatment.save(output)
    document["file"] = None if output is None else str(output)
    if output is not None:
        common.err().print(Text.assemble("written: ", (str(output), "bold")), soft_wrap=True)
    if as_json:
        common.print_json(document)
        return
    _show(document)


def _show(document: dict[str, Any]) -> None:
    console = common.out()
    layers = ", ".join(map(str, document["layers"]))
    where = "subject's last token" if document["at"] == "subject" else "prompt's last token"
    console.print(
        Text(f"{document['method']}, {document['facts']} facts, layer {layers}, {where} ({document['place']})", "bold"),
        soft_wrap=True,
    )
    for one in document["answers"][:10]:
        said = {key: common.plain(value) for key, value in one.items()}
        style = "" if one["after"] == one["wanted"] else "yellow"
        console.print(
            Text(f"  {said['prompt']} -> {said['after']} (before: {said['before']}; wanted: {said['wanted']})", style),
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("score", "before", "after", "95 % interval", "facts"):
        table.add_column(name, overflow="fold")
    for one in document["scores"]:
        after, before = one["after"], one["before"]
        if after["value"] is None:
            continue
        interval = "" if after["low"] is None else f"[{after['low']:.3f}, {after['high']:.3f}]"
        then = "" if before is None or before["value"] is None else f"{before['value']:.3f}"
        table.add_row(one["name"], then, f"{after['value']:.3f}", interval, str(after["n"]))
    console.print(table)
    for name, why in document["not_measured"].items():
        console.print(Text(f"{name}: not measured, because {why}", style="dim"), soft_wrap=True)
