"""A graph as a picture: nodes on levels, the lowest at the bottom as the stream flows, edges as lines between them.

A line's width is the size of its weight, its colour the sign; what it is stands under the pointer. How it can mislead:
where two nodes stand side by side says nothing, and many thin edges together can carry more than one broad one. Beyond
`EDGES` only the largest edges are drawn, and the page says how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tomoscope.findings.estimate import format_number
from tomoscope.findings.finding import FigureRef
from tomoscope.scan.markup import clip, element, escape, svg, text

EDGES = 400
"""The most edges that one picture draws."""
WIDTH, WIDEST, LEVEL, BOX, LETTERS = 720, 6000.0, 46.0, 17.0, 12


def graph(figure: FigureRef, parts: Mapping[str, np.ndarray]) -> str:
    """Nodes as boxes with their names, edges as curves from the top of one to the bottom of another."""
    places, ends, weights = parts["places"], parts["ends"].astype(int), parts["weights"]
    names, levels = figure.labels.get("node", ()), figure.labels.get("level", ())
    left = 16 + 6.2 * min(14, max((len(level) for level in levels), default=0))
    used = sorted({int(level) for level in places[:, 0]})
    height = LEVEL * max(1, len(used))
    boxes = np.array([10 + 6.0 * len(clip(name, LETTERS)) for name in names])
    wide = float(boxes.max(initial=16.0))
    right = max(WIDTH, left + wide + 8 + min(WIDEST, _room(places, boxes)))

    def x(node: int) -> float:
        return left + wide / 2 + float(places[node, 1]) * (right - left - wide - 8)

    def y(node: int) -> float:
        return 8 + height - LEVEL * (used.index(int(places[node, 0])) + 0.5)

    order = np.argsort(-np.abs(weights), kind="stable")[:EDGES]
    most = float(np.abs(weights).max(initial=0.0)) or 1.0
    body = ""
    for level in used:
        at = 8 + height - LEVEL * (used.index(level) + 0.5)
        body += element("line", x1=left, x2=right - 8, y1=at, y2=at, class_="grid")
        body += text(left - 8, at + 3.5, clip(levels[level], 14), class_="tick", anchor="end")
    for edge in reversed(order.tolist()):
        body += _edge(figure, edge, ends[edge], float(weights[edge]), most, names, x, y)
    for node, name in enumerate(names):
        said, own = clip(name, LETTERS), float(boxes[node])
        body += element(
            "rect", element("title", escape(name)), x=x(node) - own / 2, y=y(node) - BOX / 2, width=own, height=BOX,
            rx=4.0, class_="node",
        )  # fmt: skip
        body += text(x(node), y(node) + 3.5, said, class_="node", anchor="middle")
    left_out = len(weights) - len(order)
    note = f"The {len(order):,} largest of {len(weights):,} edges are drawn." if left_out else ""
    return svg(right, height + 16, body, label=f"{figure.title} {figure.caption}") + (
        element("p", note, class_="note") if note else ""
    )


def _room(places: np.ndarray, boxes: np.ndarray) -> float:
    """How wide the picture must be so that no two boxes on one level meet."""
    order = np.lexsort((places[:, 1], places[:, 0]))
    steps, sizes = np.diff(places[order], axis=0), boxes[order]
    beside = (steps[:, 0] == 0) & (steps[:, 1] > 1e-9)
    needed = (sizes[1:] + sizes[:-1])[beside] / 2 + 4
    return float((needed / steps[beside, 1]).max(initial=0.0))


def _edge(figure: FigureRef, edge: int, ends: np.ndarray, weight: float, most: float, names, x, y) -> str:
    source, end = int(ends[0]), int(ends[1])
    inputs = figure.labels.get("input", ())
    by = f", by its {inputs[edge]}" if inputs and inputs[edge] else ""
    title = f"{names[source]} to {names[end]}{by}: {format_number(weight)} {figure.axes.get('value', '')}".strip()
    x0, y0, x1, y1 = x(source), y(source) - BOX / 2, x(end), y(end) + BOX / 2
    bend = (y0 - y1) / 2
    path = f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 - bend:.1f} {x1:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"
    css = "series0" if weight >= 0 else "series1"
    width = 0.6 + 4.4 * abs(weight) / most
    return element("path", element("title", escape(title)), d=path, stroke_width=float(width), class_=f"edge {css}")
