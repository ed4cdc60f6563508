"""Pictures on a page of their own, outside a run: what `tomoscope graph` and others of one result write.

The page is as closed as a report: no network, every string escaped. It shows the picture and nothing that proves it, so
the words beside it (`notes`) must.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tomoscope.findings.figures import Figure
from tomoscope.findings.files import write_bytes
from tomoscope.findings.finding import FigureRef
from tomoscope.scan.colour import style_sheet
from tomoscope.scan.figures import draw
from tomoscope.scan.markup import element, escape
from tomoscope.scan.page import asset, document

ALONE = "body { display: block; } main { max-width: 96rem; margin: 0 auto; padding: 3rem 1.5rem; }"
"""A page without the report's table of contents beside it."""


def write_page(path: str | Path, title: str, figures: Sequence[Figure], *, notes: Sequence[str] = ()) -> Path:
    """Write one page of pictures atomically, and return where it is.

    Args:
        path: of the page.
        title: its heading.
        figures: drawn one below the other; tables and texts too.
        notes: lines above them.
    """
    drawn = "".join(_drawn(figure, place) for place, figure in enumerate(figures))
    said = "".join(element("p", escape(note)) for note in notes)
    body = element("main", element("h1", escape(title)) + said + drawn)
    page = document(f"{title} · tomoscope", body, style=asset("page.css") + style_sheet() + ALONE)
    write_bytes(Path(path), page.encode("utf-8", "replace"))
    return Path(path)


def _drawn(figure: Figure, place: int) -> str:
    """A figure that is in no ledger, drawn as if it were."""
    ref = FigureRef(
        name=f"figure {place}", exam="", kind=figure.kind,  # ty: ignore[invalid-argument-type]
        title=figure.title, caption=figure.caption,
        arrays={part: part for part in figure.arrays}, labels=dict(figure.labels), axes=dict(figure.axes),
        scale=figure.scale, center=figure.center, marks=figure.marks, references=dict(figure.references),
        table="table" if figure.columns else "", text=figure.text,
    )  # fmt: skip
    return draw(ref, figure.arrays, {"table": figure.columns} if figure.columns else {})
