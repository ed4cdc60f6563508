"""`tomoscope probe`, `truth`, `lies`, `erase`, `steer`: concepts of a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)]
DataOption = Annotated[Path, typer.Option("--data", help="A .csv, .tsv, .jsonl or .parquet table.")]
TextOption = Annotated[str, typer.Option("--text", help="Column of texts.", show_default=False)]
LabelOption = Annotated[str, typer.Option("--label", help="Column of labels.", show_default=False)]
ClusterOption = Annotated[
    str, typer.Option("--cluster", help="Column that says which rows share a source.", show_default=False)
]
GroupOption = Annotated[str, typer.Option("--group", help="Column of templates or data sets.", show_default=False)]
LimitOption = Annotated[int | None, typer.Option("--limit", min=8, help="First rows only.", show_default=False)]
AtOption = Annotated[str, typer.Option("--at", help='"last", "mean", or a position.')]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of splits, shuffles and starts.")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="A folder for what was found.", show_default=False)]


def _load(path: Path, text: str, label: str, cluster: str, group: str, limit: int | None) -> Any:
    from tomoscope.exams.files import load_table

    data = load_table(path, text=text, label=label, cluster=cluster, group=group, limit=limit)
    for note in data.notes:
        common.err().print(Text(f"note: {common.plain(note)}", style="yellow"), soft_wrap=True)
    return data


def _position(at: str) -> Any:
    return int(at) if at.lstrip("-").isdigit() else at


def _said(one: dict[str, Any] | None) -> tuple[str, str]:
    if one is None or one["value"] is None:
        return "not measured", "" if one is None else common.plain(one["missing"])
    interval = "" if one["low"] is None else f"[{one['low']:.3f}, {one['high']:.3f}]"
    return f"{one['value']:.3f}", interval


def _table(rows: dict[str, dict[str, Any] | None], heading: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (heading, "", "95 % interval"):
        table.add_column(name, overflow="fold")
    for name, one in rows.items():
        table.add_row(common.plain(name), *_said(one))
    return table


def _told(document: dict[str, Any], folder: Path | None, as_json: bool, direction: Any = None) -> bool:
    """Write what was found where a folder is named, and print it as JSON where that is wanted; whether it was."""
    if folder is not None:
        _write(folder, document, direction)
    if as_json:
        common.print_json(document)
    return as_json


def _write(folder: Path, document: dict[str, Any], direction: Any) -> None:
    from tomoscope.exams.concept_run import save_direction
    from tomoscope.findings.files import write_json, writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "found.json"]
    write_json(paths[0], document)
    if direction is not None:
        paths.append(save_direction(direction, folder))
    for path in paths:
        common.err().print(Text.assemble("written: ", (str(path), "bold")), soft_wrap=True)


@told
def probe(
    data: DataOption,
    model: ModelArgument = None,
    text: TextOption = "",
    label: LabelOption = "",
    cluster: ClusterOption = "",
    group: GroupOption = "",
    site: Annotated[list[str] | None, typer.Option("--site", help="Sites; every block's by default.")] = None,
    at: AtOption = "last",
    method: Annotated[str, typer.Option("--method", help="logistic, ridge, means, discriminant.")] = "logistic",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    output: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Probe every layer for the labels of a table: where they can be read, against shuffled labels and the surface.

    Layer and regularisation are chosen on one half of the sources, and all figures are of the other half.
    """
    from tomoscope.exams.concept_run import probe_labels

    texts = _load(data, text, label, cluster, group, limit)
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        found = probe_labels(
            subject, texts, sites=site or ("layer.*.resid_post",), at=_position(at), method=method, seed=seed
        )
    document = found.document()
    if _told(document, output, as_json, found.probes.directions.get(found.probes.best)):
        return
    console = common.out()
    console.print(Text(f"{document['data']}: {document['n']} texts, best at {document['best']}", style="bold"))
    console.print(_table({one["site"]: one["accuracy"] for one in document["layers"]}, "held-out share right"))
    beside = {"shuffled labels, best layer": document["shuffled_labels_best_layer"], **document["surface"]}
    beside |= {"selectivity": document["selectivity"], "ROC area": document["roc_area"]}
    console.print(_table(beside | {"calibration error": document["calibration_error"]}, "beside it"))
    console.print(f"p = {document['p_value']:.2g} against the best of all layers; the commonest class: "
                  f"{document['majority']:.3f}", soft_wrap=True)  # fmt: skip
    if document["distractors"]:
        said = ", ".join(f"{name} {area:.2f}" for name, area in document["distractors"].items())
        console.print(Text(f"what the scores follow (ROC area): {common.plain(said)}"), soft_wrap=True)


@told
def truth(
    data: DataOption,
    model: ModelArgument = None,
    text: TextOption = "",
    label: LabelOption = "",
    cluster: ClusterOption = "",
    group: GroupOption = "",
    restarts: Annotated[int, typer.Option("--restarts", min=1, help="Of CCS.")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of CCS.")] = 1000,
    anchors: Annotated[int, typer.Option("--anchors", min=0, help="Labelled items that set the sign.")] = 8,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    output: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Find truth without labels in statements: CCS in three presets, CRC-TPC, LAT, beside zero-shot and a ceiling."""
    from tomoscope.exams.truth_run import truth_labels

    texts = _load(data, text, label, cluster, group, limit)
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        found = truth_labels(subject, texts, restarts=restarts, steps=steps, anchors=anchors, seed=seed)
    if _told(found.document, output, as_json, found.direction):
        return
    console = common.out()
    for one in found.document["templates"]:
        console.print(Text(f"{common.plain(one['template'])} {one['words'][0]} /{one['words'][1]}, {one['site']}",
                           style="bold"), soft_wrap=True)  # fmt: skip
        names = (
            "zero-shot", "calibrated zero-shot", "contextually calibrated zero-shot", "logistic regression (ceiling)",
        )  # fmt: skip
        rows = {name: one[name] for name in names}
        rows |= {name: got["accuracy"] for name, got in one["methods"].items() if got["accuracy"]}
        console.print(_table(rows, f"right on {found.document['held_out']} held-out statements"))
        for name, got in one["methods"].items():
            most = next(iter(got["distractors"]))
            console.print(
                f"  {name}: restarts agree {got['restarts agree']:.2f}, folded {got['folded accuracy']:.3f}, follows "
                f"{most} most ({got['distractors'][most]:.2f}), sign by {got['orientation']}", style="dim",
                soft_wrap=True,
            )  # fmt: skip


@told
def lies(
    statements: Annotated[
        Path, typer.Option("--statements", help="A table of statements, or of prompt, right, wrong.")
    ],
    model: ModelArgument = None,
    setting: Annotated[
        str, typer.Option("--setting", help="Words before each prompt, or a template with {prompt} and {wrong}.")
    ] = "Between you and me,",
    text: TextOption = "",
    label: LabelOption = "",
    rate: Annotated[float, typer.Option("--rate", help="Share of honest items that may be accused.")] = 0.05,
    reference: Annotated[
        str | None, typer.Option("--reference", help="An honest model, whose answers in the setting set the threshold.")
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option("--truth-data", help="Labelled statements to learn truth directions from; else the items' own."),
    ] = None,
    polarity: Annotated[
        str, typer.Option("--polarity", help="Their column of 1 (affirmative) and -1 (negated).", show_default=False)
    ] = "",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    output: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Compare what a model says in a setting with what it believes, item by item.

    The belief is its answer in a neutral setting, and what truth directions make of both completions.
    """
    from tomoscope.exams.files import truth_data
    from tomoscope.exams.lying import asked_from_file
    from tomoscope.exams.lying import lies as ask

    asked = asked_from_file(statements, setting=setting, text=text, label=label, limit=limit)
    known, signs = (None, None) if labelled is None else truth_data(labelled, polarity)
    subject = common.opened(model, device, dtype)
    other = None if reference is None else common.opened(reference, device, dtype)
    with common.quiet_stdout():
        document = ask(
            subject, asked, rate=rate, reference=other, statements=known, polarity=signs, seed=seed
        ).document()
    if _told(document, output, as_json):
        return
    console = common.out()
    console.print(_table(document["shares"], f"share of {document['n']} items"))
    judged = document["truth_direction"]
    if "missing" in judged:
        console.print(f"truth directions: not measured, because {common.plain(judged['missing'])}", soft_wrap=True)
    else:
        console.print(_table(judged["shares"], f"truth directions at {', '.join(dict.fromkeys(judged['sites']))}"))
    for one in [one for one in document["items"] if one["lie"]][:20]:
        said, meant = common.plain(one["says"].strip()), common.plain(one["believes"].strip())
        console.print(f"  {common.plain(one['prompt'])} says {said}, believes {meant}", soft_wrap=True)


@told
def erase(
    data: DataOption,
    site: Annotated[str, typer.Option("--site", help="Where the labels are erased.")],
    model: ModelArgument = None,
    text: TextOption = "",
    label: LabelOption = "",
    cluster: ClusterOption = "",
    at: AtOption = "last",
    method: Annotated[str, typer.Option("--method", help="leace, orthogonal, mean, inlp.")] = "leace",
    limit: LimitOption = None,
    seed: SeedOption = 0,
    output: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Erase the labels of a table from a site, and say what fresh probes (linear and not) still find."""
    from tomoscope.exams.concept_run import erase_labels

    texts = _load(data, text, label, cluster, "", limit)
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        eraser, document = erase_labels(subject, texts, site=site, at=_position(at), method=method, seed=seed)
    if _told(document, output, as_json, eraser.direction(texts.name, document["site"]) if eraser.rank == 1 else None):
        return
    console = common.out()
    console.print(Text(f"{method} at {document['site']}: rank {document['rank']}, moves {document['moved']:.1%}"))
    for name, one in document["probes"].items():
        rows = {f"{name}, linear probe": one["linear"], f"{name}, MLP": one["mlp"]}
        console.print(_table(rows, f"share right (commonest class {one['majority']:.3f})"))


@told
def steer(
    direction: Annotated[Path, typer.Option("--direction", help="A direction that probe, truth or erase wrote.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="A text file, one prompt a line.")],
    answers: Annotated[str, typer.Option("--answers", help='The two answers, "for,against".')],
    model: ModelArgument = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Held-out text, one a line; the prompts by default.")
    ] = None,
    doses: Annotated[str, typer.Option("--doses", help="In steps of the direction.")] = "0.5,1,2,4",
    most_loss: Annotated[float, typer.Option("--most-loss", help="Nats a token that the text may lose.")] = 0.1,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the chosen dose: .gguf or .safetensors.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    output: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Steer along a direction: the answer's rise and the text's loss over doses, and the dose that the rule takes."""
    from tomoscope.exams.concept_run import steer_doses
    from tomoscope.exams.files import export_steering, read_direction, read_lines, two_answers

    found, lines = read_direction(direction), read_lines(prompts)
    pair, steps = two_answers(answers, doses)
    texts = lines if corpus is None else read_lines(corpus)
    subject = common.opened(model, device, dtype)
    with common.quiet_stdout():
        document = steer_doses(subject, found, lines, pair, texts, doses=steps, most_loss=most_loss, seed=seed)
        if export is not None:
            export_steering(subject, export, found, document["dose"])
    if _told(document, output, as_json):
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("dose", "effect", "random", "loss", "perplexity", "kl", "repetition")
    for name in columns:
        table.add_column(name, justify="right")
    for row in document["curve"]:
        table.add_row(*(f"{row[name]:.3g}" for name in columns))
    common.out().print(table)
    common.out().print(f"the rule takes dose {document['dose']:g}: {document['rule']}", soft_wrap=True)
