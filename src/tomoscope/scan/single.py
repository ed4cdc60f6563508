"""Pictures on a page of their own, outside a run: what `tomoscope graph` and others of one result write.

The page is as closed as a report: no network, every string escaped. It shows the picture and nothing that proves it, so
the words beside it (`notes`) must.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tomoscope.findings.figures import Figure
from tomoscope.findings.files import write_bytes
from tomoscope.findings.finding import FigureRef
from tomoscope.scan.colour import style_sheet
from tomoscope.scan.figures import draw
from tomoscope.scan.markup import element, escape

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
    style = (resources.files("tomoscope.scan") / "page.css").read_text(encoding="utf-8") + style_sheet() + ALONE
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    drawn = "".join(_drawn(figure, place) for place, figure in enumerate(figures))
    said = "".join(element("p", escape(note)) for note in notes)
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)} · tomoscope</title><style>{style}</style>"
    )
    body = element("main", element("h1", escape(title)) + said + drawn)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
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
