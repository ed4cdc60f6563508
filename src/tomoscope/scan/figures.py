"""Matrices, attention patterns, coloured texts and tables of a run, as HTML and SVG (charts and graphs beside it).

Each function takes a `FigureRef` and its arrays and gives markup. Small matrices are drawn cell by cell, with the value
under the pointer; beyond `CELLS` they become one embedded PNG, so a page stays small. What is left out is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tomoscope.findings.estimate import format_number
from tomoscope.findings.finding import FigureRef
from tomoscope.scan.charts import bars, curve
from tomoscope.scan.colour import LEVELS, Scale, data_uri, png, shrink
from tomoscope.scan.graphs import graph
from tomoscope.scan.markup import clip, element, escape, svg, text, token_text

CELLS = 2400
"""The largest matrix that is drawn cell by cell."""
WRITTEN = 64
"""The largest matrix whose numbers are written in its cells."""
PIXELS = 2048
"""The largest side of an embedded picture."""
PATTERNS = 24
"""The most attention patterns that one figure shows."""
ROWS = 100
"""The most rows of a table that the page shows."""

WIDTH = 720


def draw(figure: FigureRef, arrays: Mapping[str, np.ndarray], tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """A figure with its title and caption; a figure whose data are not in the run says so."""
    parts = {part: arrays[name] for part, name in figure.arrays.items() if name in arrays}
    if len(parts) < len(figure.arrays) or (figure.table and figure.table not in tables):
        body = element("p", "The figure's data are not in the run.", class_="quiet")
    elif figure.kind == "heatmap":
        body = heatmap(figure, parts["values"])
    elif figure.kind == "curve":
        body = curve(figure, parts)
    elif figure.kind == "bars":
        body = bars(figure, parts)
    elif figure.kind == "attention":
        body = attention(figure, parts["pattern"])
    elif figure.kind == "tokens":
        body = tokens(figure, parts["values"])
    elif figure.kind == "graph":
        body = graph(figure, parts)
    elif figure.kind == "table":
        body = table(tables[figure.table] if figure.table else {})
    else:
        body = element("pre", escape(figure.text), class_="said")
    caption = element("b", escape(figure.title)) + (f" {escape(figure.caption)}" if figure.caption else "")
    return element("figure", f'<div class="scroll">{body}</div>' + element("figcaption", caption), class_=figure.kind)


def heatmap(figure: FigureRef, values: np.ndarray) -> str:
    """A matrix with a colour bar, labelled axes and outlined marks; layers grow upwards, as the stream flows."""
    scale = Scale(values, kind=figure.scale, center=figure.center)
    upwards = figure.axes.get("y", "").startswith("layer")
    rows, columns = values.shape
    names = [token_text(label) for label in figure.labels.get("column", ())]
    sides = [token_text(label) for label in figure.labels.get("row", ())]
    left = 40 + 6.2 * min(14, max((len(side) for side in sides), default=1))
    width = min(WIDTH - left - 88, max(120.0, columns * (46.0 if values.size <= WRITTEN else 34.0)))
    cell_w = width / columns
    cell_h = float(np.clip(cell_w if rows * cell_w < 420 else 420 / rows, 420 / rows if rows > 48 else 9, 30))
    height = rows * cell_h
    steep = cell_w < 6.4 * max((len(clip(name, 12)) for name in names), default=1) and columns > 1
    below = (18 + 4.6 * min(12, max((len(name) for name in names), default=1)) if steep else 20) + 20

    def top(row: int) -> float:
        return 8 + (rows - 1 - row if upwards else row) * cell_h

    if values.size <= CELLS:
        body = _cells(figure, values, scale, left, cell_w, cell_h, top)
        note = ""
    else:
        body, note = _raster(figure, values, scale, left, 8.0, width, height, upwards)
    for row, column in figure.marks:
        if 0 <= row < rows and 0 <= column < columns:
            body += element("rect", x=left + column * cell_w, y=top(row), width=cell_w, height=cell_h, class_="mark")
    body += _labels(sides, names, left, height, cell_w, cell_h, top, steep)
    body += text(left + width / 2, 8 + height + below - 2, figure.axes.get("x", ""), class_="axis", anchor="middle")
    middle = 8 + height / 2
    body += text(
        12, middle, figure.axes.get("y", ""), class_="axis", anchor="middle", transform=f"rotate(-90 12 {middle:.1f})"
    )
    body += colour_bar(scale, left + width + 16, 8, max(96.0, min(height, 200.0)), figure.axes.get("value", ""))
    tall = max(8 + height + below + 4, 8 + max(96.0, min(height, 200.0)) + 34)
    return svg(left + width + 88, tall, body, label=f"{figure.title} {figure.caption}") + note


def _cells(
    figure: FigureRef, values: np.ndarray, scale: Scale, left: float, cell_w: float, cell_h: float, top: Any
) -> str:
    steps = scale.steps(values)
    rows, columns = figure.labels.get("row", ()), figure.labels.get("column", ())
    y_name, x_name = figure.axes.get("y", "row"), figure.axes.get("x", "column")
    gap = 0.6 if min(cell_w, cell_h) > 7 else 0.0
    write = values.size <= WRITTEN and cell_w > 40 and cell_h > 16
    most = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
    parts = []
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = float(values[row, column])
            said = format_number(value) if np.isfinite(value) else "not measured"
            title = f"{y_name} {rows[row]}, {x_name} {token_text(columns[column])}: {said}"
            css = scale.css(int(steps[row, column]))
            x, y = left + column * cell_w, top(row)
            parts.append(
                element(
                    "rect",
                    element("title", escape(title)),
                    x=x,
                    y=y,
                    width=cell_w - gap,
                    height=cell_h - gap,
                    class_=css,
                )
            )
            if write:
                short = _short(value, most) if np.isfinite(value) else ""
                parts.append(text(x + cell_w / 2, y + cell_h / 2 + 3.5, short, class_=f"in {css}", anchor="middle"))
    return "".join(parts)


def _short(value: float, most: float) -> str:
    """A cell's number in five characters or fewer, to the digits that matter beside the largest of the matrix."""
    if most >= 1000 or 0 < most < 0.01:
        return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    said = f"{value:.{2 if most < 10 else 1 if most < 100 else 0}f}"
    return said.replace("-", "−") if float(said) else "0"


def _raster(
    figure: FigureRef, values: np.ndarray, scale: Scale, left: float, y: float, width: float, height: float, up: bool
) -> tuple[str, str]:
    """The matrix as two embedded pictures, one for each colour scheme; and what was pooled."""
    small, by_row, by_column = shrink(
        values, limit=PIXELS, center=figure.center if figure.scale == "diverging" else 0.0
    )
    steps = scale.steps(small[::-1] if up else small)
    images = "".join(
        element(
            "image", href=data_uri(png(steps, scale=figure.scale, mode=mode)), x=left, y=y, width=width, height=height,
            preserveAspectRatio="none", class_=f"{mode}-only",
        )
        for mode in ("light", "dark")
    )  # fmt: skip
    said = f"{values.shape[0]:,} × {values.shape[1]:,} values, drawn as a picture"
    if by_row * by_column > 1:
        said += f"; each pixel shows the strongest of {by_row} × {by_column}"
    return images, element("p", f"{said}. The values are in the run's arrays.", class_="note")


def _labels(
    sides: Sequence[str], names: Sequence[str], left: float, height: float, cell_w: float, cell_h: float, top: Any,
    steep: bool,
) -> str:  # fmt: skip
    """Labels of rows and columns, thinned where they would overlap."""
    parts = []
    for row in range(0, len(sides), _every(sides, 11 / cell_h)):
        parts.append(text(left - 6, top(row) + cell_h / 2 + 3.5, clip(sides[row], 14), class_="tick", anchor="end"))
    numbers = all(name.isdecimal() for name in names)
    steep = steep and not numbers
    room = 7.5 * max((len(name) for name in names), default=1) if numbers else 12 if steep else 10
    for column in range(0, len(names), _every(names, room / cell_w)):
        x, y, name = left + (column + 0.5) * cell_w, 8 + height + 13, clip(names[column], 12)
        if steep:
            turn = f"rotate(-50 {x + 3:.1f} {y - 3:.1f})"
            parts.append(text(x + 3, y - 3, name, class_="tick", anchor="end", transform=turn))
        else:
            parts.append(text(x, y, name, class_="tick", anchor="middle"))
    return "".join(parts)


def _every(names: Sequence[str], least: float) -> int:
    """Every which label can be written, where one takes the room of `least` cells; a round step for plain numbers."""
    if least <= 1:
        return 1
    if all(name.isdecimal() for name in names):
        return next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= least)
    return int(np.ceil(least))


def colour_bar(scale: Scale, x: float, y: float, height: float, label: str) -> str:
    """The scale, with its ends and (when diverging) its middle."""
    step = height / LEVELS
    parts = [
        element("rect", x=x, y=y + (LEVELS - 1 - i) * step, width=10.0, height=step + 0.4, class_=scale.css(i))
        for i in range(LEVELS)
    ]
    values = [scale.low, (scale.low + scale.high) / 2, scale.high]
    parts += [
        text(x + 14, y + height * (1 - place / 2) + 3.5, format_number(value), class_="tick")
        for place, value in enumerate(values)
    ]
    if label:
        # turned, beside the numbers: below, it would run into the ticks of a narrow matrix
        middle = f"rotate(-90 {x + 62:.1f} {y + height / 2:.1f})"
        parts.append(text(x + 62, y + height / 2, clip(label, 22), class_="axis", anchor="middle", transform=middle))
    return "".join(parts)


def attention(figure: FigureRef, pattern: np.ndarray) -> str:
    """One square per head, query downwards and key to the right, all on one scale from 0 to 1."""
    names = [token_text(token) for token in figure.labels.get("token", ())]
    heads = figure.labels.get("head", ())
    scale = Scale(np.array([0.0, max(1.0, float(np.nanmax(pattern, initial=1.0)))]), kind="sequential")
    many = pattern.shape[1] * pattern.shape[2] > 600
    squares = [_square(figure, pattern[i], heads[i], names, scale, many) for i in range(min(PATTERNS, len(pattern)))]
    note = ""
    if len(pattern) > PATTERNS:
        note = element(
            "p", f"{PATTERNS} of {len(pattern)} heads are shown; all are in the run's arrays.", class_="note"
        )
    return element("div", "".join(squares), class_="patterns") + note


def _square(figure: FigureRef, pattern: np.ndarray, head: str, names: Sequence[str], scale: Scale, many: bool) -> str:
    queries, keys = pattern.shape
    labelled = keys <= 40
    left = 8 + 5.4 * min(10, max((len(name) for name in names), default=1)) if labelled else 8.0
    size = 168.0
    cell_w, cell_h = size / keys, size / queries
    steps = scale.steps(pattern)
    parts = [text(left, 14, head, class_="head")]
    if many:
        small, _, _ = shrink(pattern, limit=512, center=0.0)
        for mode in ("light", "dark"):
            image = data_uri(png(scale.steps(small), scale="sequential", mode=mode))
            parts.append(
                element(
                    "image", href=image, x=left, y=22.0, width=size, height=size, preserveAspectRatio="none",
                    class_=f"{mode}-only",
                )
            )  # fmt: skip
    else:
        for query in range(queries):
            for key in range(keys):
                if steps[query, key] == 0 and key > query:
                    continue
                title = f"{names[query] if query < len(names) else query} → {names[key]}: {pattern[query, key]:.2f}"
                parts.append(
                    element(
                        "rect", element("title", escape(title)), x=left + key * cell_w, y=22 + query * cell_h,
                        width=cell_w, height=cell_h, class_=scale.css(int(steps[query, key])),
                    )
                )  # fmt: skip
    parts.append(element("rect", x=left, y=22.0, width=size, height=size, class_="frame"))
    below = 6.0
    if labelled:
        every = _every(names, 8.5 / cell_h)
        below = 12 + 4.2 * min(10, max((len(name) for name in names), default=1))
        for place in range(0, keys, every):
            name = clip(names[place], 10)
            x, y = left + (place + 0.5) * cell_w + 2, 22 + size + 8
            parts.append(text(left - 3, 22 + (place + 0.5) * cell_h + 2.8, name, class_="tiny", anchor="end"))
            parts.append(text(x, y, name, class_="tiny", anchor="end", transform=f"rotate(-50 {x:.1f} {y:.1f})"))
    return svg(left + size + 6, 22 + size + below, "".join(parts), label=f"{figure.title} {head}")


def tokens(figure: FigureRef, values: np.ndarray) -> str:
    """A text whose tokens lie on the colour of their value, with the scale below."""
    scale = Scale(values, kind=figure.scale, center=figure.center)
    steps = scale.steps(values)
    spans = [
        element("span", escape(token_text(name)), class_=f"tok {scale.css(int(step))}", title=_said(float(value)))
        + ("<wbr>" if "\n" not in str(name) else "<br>")
        for name, step, value in zip(figure.labels["token"], steps, values, strict=True)
    ]
    width = 220.0
    step = width / LEVELS
    bar = [element("rect", x=i * step, y=0.0, width=step + 0.4, height=8.0, class_=scale.css(i)) for i in range(LEVELS)]
    bar += [
        text(width * place, 21, format_number(scale.low + place * (scale.high - scale.low)), class_="tick", anchor=side)
        for place, side in ((0, "start"), (0.5, "middle"), (1, "end"))
    ]
    bar.append(text(width + 10, 8, figure.axes.get("value", ""), class_="axis"))
    return element("p", element("bdi", "".join(spans)), class_="coloured") + svg(
        width + 180, 26, "".join(bar), label="colour scale"
    )


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """A table; numbers are right-aligned, long ones rounded to three digits."""
    if not columns:
        return element("p", "The table is empty.", class_="quiet")
    names = list(columns)
    numeric = {name: all(isinstance(value, (int, float, type(None))) for value in columns[name]) for name in names}
    head = "".join(element("th", escape(name), class_="num" if numeric[name] else "", scope="col") for name in names)
    length = len(columns[names[0]])
    body = "".join(
        element("tr", "".join(_cell(columns[name][row], numeric[name]) for name in names))
        for row in range(min(ROWS, length))
    )
    note = (
        element("p", f"{ROWS} of {length:,} rows are shown; all are in the run's table.", class_="note")
        if length > ROWS
        else ""
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(value: Any, numeric: bool) -> str:
    if not numeric:
        return element("td", element("bdi", escape(token_text(value) if value is not None else "–")).replace("·", " "))
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return element("td", "–", class_="num")
    return element("td", f"{value:,}" if isinstance(value, int) else format_number(float(value)), class_="num")


def _said(value: float) -> str:
    return format_number(value) if np.isfinite(value) else "not measured"
