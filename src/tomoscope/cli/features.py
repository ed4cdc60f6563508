"""`tomoscope features`: the group of commands about dictionaries, and those that run a model over a text.

`measure` and `dashboards` are here; `features_book` has label, search and show; `features_files` import and export.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told
from tomoscope.cli.features_book import label, search, show
from tomoscope.cli.features_files import export, import_
from tomoscope.cli.training import train

if TYPE_CHECKING:
    from tomoscope.features import Quality

features = typer.Typer(
    name="features",
    help="Dictionaries of features: train, measure, dashboards, label, search, show, import, export.",
    no_args_is_help=True,
    add_completion=False,
)
CoderOption = Annotated[Path, typer.Option("--coder", "-c", help="The dictionary: a file or folder.")]
SiteOption = Annotated[
    str, typer.Option("--site", "-s", help="layer.3.resid_post; as the dictionary says by default.", show_default=False)
]
CorpusOption = Annotated[
    str,
    typer.Option("--corpus", help="Text: a file, folder or hub id; the micro-world's by default.", show_default=False),
]
RowsOption = Annotated[int, typer.Option("--rows", min=2, help="Rows of tokens that are read.")]
LengthOption = Annotated[int, typer.Option("--length", min=2, help="Tokens a row.")]


def rows_for(subject: Any, corpus: str, rows: int, length: int, seed: int) -> list[list[int]]:
    """Rows of token ids of a corpus, or of the micro-world's text where none is named."""
    from itertools import islice

    from tomoscope.errors import DataError, TokenizerError

    if subject.tokenizer is None:
        raise TokenizerError("The model has no tokenizer, so it can't read a corpus.")
    length = min(length, subject.facts.context or length)
    if corpus:
        from tomoscope.data import Corpus

        found: Iterable[list[int]] = (row.ids.tolist() for row in Corpus(corpus).pack(subject.tokenizer, length))
    else:
        from tomoscope.phantoms.world import corpus as world_text
        from tomoscope.phantoms.world import shipped_world

        texts = world_text(shipped_world(), seed=seed, split="features")
        read = (subject.tokenizer(text, verbose=False)["input_ids"] for text in texts)
        found = (ids[i : i + length] for ids in read for i in range(0, len(ids), length))
    listed = list(islice(found, rows))
    if len(listed) < 2:
        raise DataError(f"The corpus has {len(listed)} rows of {length} tokens.", remedy="Give more text.")
    return listed


@told
def measure(
    coder: CoderOption,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    site: SiteOption = "",
    corpus: CorpusOption = "",
    rows: RowsOption = 256,
    length: LengthOption = 128,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Beside dumb dictionaries.")] = True,
    skip_first: Annotated[bool, typer.Option("--skip-first", help="Leave each row's first token out.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the text, controls and intervals.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure a dictionary: what it keeps, how sparsely, and what the model loses with it in place.

    Baselines (random directions, principal components, neurons) are fitted on half of the rows; everything is measured
    on the other half.
    """
    from tomoscope.errors import DataError
    from tomoscope.features import import_coder, measure_baselines, measure_coder

    console = common.err()
    dictionary = import_coder(coder)
    subject = common.open_subject(model, device=device, dtype=dtype)
    texts = rows_for(subject, corpus, rows, length, seed)
    chosen, measured = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    console.print(Text(f"{dictionary!r} on {sum(map(len, measured)):,} tokens ...", style="dim"))
    options: dict[str, Any] = {"reads": site, "skip_first": skip_first, "seed": seed}
    with common.quiet_stdout():
        found = {"dictionary": measure_coder(subject, dictionary, measured, **options)}
        k = found["dictionary"]["l0"].value
        why = ""
        if baselines:
            try:
                found |= measure_baselines(subject, dictionary, chosen, measured, k=k or 0.0, **options)
            except DataError as error:
                why = error.what
    if as_json:
        common.print_json({name: one.document() for name, one in found.items()} | {"baselines_missing": why})
        return
    common.out().print(quality_table(found))
    if why:
        common.out().print(Text(f"baselines not measured: {why}", style="yellow"), soft_wrap=True)


def quality_table(found: dict[str, Quality]) -> Table:
    """One row a measure, one column a dictionary."""
    from tomoscope.findings import format_number

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", *found):
        table.add_column(heading)
    first = next(iter(found.values()))
    for name, own in first.measures.items():
        cells = []
        for one in found.values():
            value = one.measures.get(name)
            if value is None or value.value is None:
                cells.append("–")
            else:
                interval = f" [{format_number(value.low)}, {format_number(value.high)}]" if one is first else ""
                cells.append(f"{format_number(value.value)}{interval}")
        table.add_row(name.replace("_", " "), *cells, style="dim" if own.value is None else "")
    return table


@told
def dashboards(
    coder: CoderOption,
    output: Annotated[Path, typer.Option("--out", "-o", help="A folder; a run that was stopped goes on there.")],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    site: SiteOption = "",
    corpus: CorpusOption = "",
    rows: RowsOption = 1024,
    length: LengthOption = 128,
    skip_first: Annotated[bool, typer.Option("--skip-first", help="Leave each row's first token out.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the text and the drawn contexts.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Make the dashboards of every feature from one pass over a corpus, and the index that searches them."""
    from tomoscope.features import (
        DashboardOptions,
        FeatureBook,
        build_index,
        harvest_codes,
        import_coder,
        make_dashboards,
    )

    console = common.err()
    dictionary = import_coder(coder)
    subject = common.open_subject(model, device=device, dtype=dtype)
    texts = rows_for(subject, corpus, rows, length, seed)

    def progress(done: int, what: str) -> None:
        console.print(Text(f"  {done:,} {what}", style="dim"))

    with common.quiet_stdout():
        store = harvest_codes(
            subject, dictionary, texts, output / "codes", reads=site, skip_first=skip_first, progress=progress
        )
        make_dashboards(subject, dictionary, store, output, options=DashboardOptions(seed=seed), progress=progress)
        build_index(output)
    book = FeatureBook.open(output)
    fires = book.column("fires")
    document = {
        "folder": str(output), "features": book.n_features, "tokens": store.n_tokens,
        "never fired": int((fires == 0).sum()),
    }  # fmt: skip
    if as_json:
        common.print_json(document)
        return
    never = f"{document['never fired']:,} never fired"
    common.out().print(
        f"{book.n_features:,} features over {store.n_tokens:,} tokens, {never}: {output}", soft_wrap=True
    )


features.command()(train)
features.command()(measure)
features.command()(dashboards)
features.command()(label)
features.command()(search)
features.command()(show)
features.command("import")(import_)
features.command()(export)
