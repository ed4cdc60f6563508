"""`tomoscope graph`: the attribution graph of one prompt, tested by taking its features away."""

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
    from tomoscope.exams.attribution_run import QKAttribution, Traced


@told
def graph(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    transcoders: Annotated[
        Path | None,
        typer.Option("--transcoders", help="A folder of transcoders, in circuit-tracer's files.", show_default=False),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt to explain.", show_default=False)] = "",
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="A token to explain, with its leading space; may be repeated.", show_default=False
        ),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option("--features", min=1, help="At most so many active features get rows.", show_default=False),
    ] = None,
    nodes: Annotated[float, typer.Option("--nodes", min=0.01, max=1.0, help="Share of influence to show.")] = 0.8,
    edges: Annotated[float, typer.Option("--edges", min=0.01, max=1.0, help="Share over edges to show.")] = 0.98,
    attends: Annotated[
        list[str] | None,
        typer.Option(
            "--attends", help="Why a head attends: LAYER.HEAD:QUERY:KEY, by token number.", show_default=False
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="Of the interventions: iterative, free, constrained.")
    ] = "iterative",
    tested: Annotated[int, typer.Option("--tested", min=1, help="Features that are taken away.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the other features.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for the graph and its page.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Which features of a prompt add what to which, up to its next token, and whether the model agrees.

    The features that the graph calls most influential are taken away in the model itself, beside others drawn at
    random. --out writes the graph as the field's JSON (circuit-tracer, Neuronpedia) and as a page.
    """
    from tomoscope.errors import DataError
    from tomoscope.exams.attribution_figures import graph_figure
    from tomoscope.exams.attribution_run import LocalReplacement, load_transcoders, trace, why_attends
    from tomoscope.scan.single import write_page

    if transcoders is None or not prompt:
        raise DataError(
            "A graph needs transcoders and a prompt.", remedy="Give --transcoders FOLDER and --prompt TEXT."
        )
    if output is not None and output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file, not a folder.", remedy="Give another --out.")
    asked = [_attends(one) for one in attends or ()]
    console = common.err()
    loaded = load_transcoders(transcoders)
    console.print(Text.assemble(("tomoscope ", "bold"), f"opens {model or 'the embedded model'} ..."))
    subject = common.open_subject(model, device=device, dtype=dtype)
    with common.quiet_stdout():
        frozen = LocalReplacement.of(subject, loaded, prompt)
        read = [
            (label, why_attends(frozen, layer=layer, head=head, query=query, key=key))
            for label, (layer, head, query, key) in zip(attends or (), asked, strict=True)
        ]
        found = trace(
            subject, loaded, prompt, targets=list(target) if target else None, max_features=features, nodes=nodes,
            edges=edges, tested=tested, mode=mode, seed=seed,
            frozen=frozen,
            progress=lambda text: console.print(Text(f"  {text}", style="dim")),
        )  # fmt: skip
        paths = []
        if output is not None:
            paths = found.save(output)
            notes = [
                "".join(found.graph.tokens), _said(found),
                f"Model: {found.graph.model}. Transcoders: {found.graph.scan or transcoders.name}. Replacement score "
                f"{found.scores.replacement:.3f}, completeness {found.scores.completeness:.3f}.",
            ]  # fmt: skip
            picture = graph_figure(found.pruned, "What leads to the next token")
            paths.append(write_page(output / "graph.html", "Attribution graph", [picture], notes=notes))
    if as_json:
        told_heads = [{"head": label, "pairs": one.pairs(), "gap": one.gap} for label, one in read]
        common.print_json(found.document() | {"attends": told_heads, "files": [str(path) for path in paths]})
        return
    _print(common.out(), found, read)
    for path in paths:
        common.out().print(Text.assemble("written: ", (str(path), "bold")), soft_wrap=True)


def _attends(text: str) -> tuple[int, int, int, int]:
    from tomoscope.errors import DataError

    try:
        head, query, key = text.split(":")
        layer, number = head.lstrip("aL").replace(".h", ".").split(".")
        return int(layer), int(number), int(query), int(key)
    except ValueError as error:
        raise DataError(
            f"--attends {text!r} names no head and tokens.", remedy="Give LAYER.HEAD:QUERY:KEY, for example 5.1:9:4."
        ) from error


def _said(found: Traced) -> str:
    """The test in one sentence."""
    first, rest = found.effects()
    beside = f"{rest.mean():+.3g} without one of {len(rest)} other active features drawn at random"
    return (
        f"Taken away one at a time, the {len(first)} most influential features move the logit of "
        f"{found.graph.logit_names[0]!r} by {first.mean():+.3g} on average"
        + (f"; it moves by {beside}." if len(rest) else "; no other feature is active to compare with.")
    )


def _print(console: Console, found: Traced, read: list[tuple[str, QKAttribution]]) -> None:
    graph, document = found.graph, found.document()
    console.print(Text(common.plain("".join(graph.tokens)), style="bold"))
    said = ", ".join(f"{one['token']!r} {one['probability']:.3f}" for one in document["logits"])
    console.print(Text(common.plain(f"next: {said}")), soft_wrap=True)
    console.print(
        f"{graph.n_features:,} active features, {graph.n_edges:,} edges; replacement score "
        f"{found.scores.replacement:.3f}, completeness {found.scores.completeness:.3f}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("feature taken away", "influence", "foretold", "came", ""):
        table.add_column(name)
    for row in document["taken_away"]:
        table.add_row(
            row["feature"], f"{row['influence']:.4f}", f"{row['foretold']:+.3f}", f"{row['came']:+.3f}",
            "drawn" if row["drawn"] else "",
        )  # fmt: skip
    console.print(table)
    console.print(Text(common.plain(_said(found))), soft_wrap=True)
    console.print(Text("strongest edges into the answer", style="dim"))
    for node, weight in graph.inputs(graph.range_of("logit").start, 8):
        console.print(Text(common.plain(f"  {weight:+8.3f}  {node.name}")), soft_wrap=True)
    for label, one in read:
        console.print(Text(f"why head {label} attends (query's node, key's node, part of the score)", style="dim"))
        for query, key, part in one.pairs(8):
            console.print(Text(common.plain(f"  {part:+8.3f}  {query} . {key}")), soft_wrap=True)
