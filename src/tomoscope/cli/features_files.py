"""`tomoscope features import | export`: dictionaries and features in other tools' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, JsonOption, TracebackOption, told

SourceArgument = Annotated[Path, typer.Argument(help="A file or folder of any format that is known.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="A folder.")]


@told
def import_(
    source: SourceArgument,
    output: OutOption,
    to: Annotated[str, typer.Option("--to", help="The format to write.")] = "dictionary_learning",
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Read a dictionary of any format that is known, and write it in another."""
    from tomoscope.features import export_coder, import_coder

    coder = import_coder(source)
    folder = export_coder(coder, output, to)
    document = {"read": repr(coder), "written": str(folder), "format": to, "features": coder.n_features}
    if as_json:
        common.print_json(document)
        return
    common.out().print(f"{coder!r} written as {to}: {folder}", soft_wrap=True)


@told
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of `features dashboards`.")],
    output: OutOption,
    to: Annotated[
        str, typer.Option("--to", help="neuronpedia (the import tree) or batches (batch-N.json).")
    ] = "neuronpedia",
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, show_default=False)] = None,
    model_id: Annotated[str, typer.Option("--model-id", help="The model's name on the site.")] = "model",
    sae_set: Annotated[str, typer.Option("--set", help="The set's name on the site.")] = "res",
    release: Annotated[str, typer.Option("--release", help="The release's name on the site.")] = "release",
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write dashboards and labels for Neuronpedia."""
    from tomoscope.cli.features_book import LABELS
    from tomoscope.errors import DataError
    from tomoscope.features import FeatureBook, export_batches, export_import_tree, index_labels, read_labels

    if to not in ("neuronpedia", "batches"):
        raise DataError(f"The format {to!r} is not known.", remedy="Known: neuronpedia, batches.")
    book = FeatureBook.open(folder)
    tokenizer = common.open_subject(model).tokenizer
    if to == "batches":
        export_batches(book, tokenizer, output, model_id=model_id, sae_set=sae_set)
    else:
        known = read_labels(folder / LABELS) if (folder / LABELS).exists() else {}
        makers = sorted({one.explainer for one in known.values()})
        export_import_tree(
            book, tokenizer, output, model_id=model_id, sae_set=sae_set, release=release, labels=index_labels(known),
            explainer=", ".join(makers),
        )  # fmt: skip
    if as_json:
        common.print_json({"written": str(output), "features": book.n_features, "format": to})
        return
    common.out().print(f"{book.n_features:,} features written: {output}", soft_wrap=True)
