"""Curves with interval bands, bars with whiskers, and the evidence of a finding: its estimate beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tomoscope.findings.estimate import Estimate, format_number
from tomoscope.findings.finding import FigureRef, Finding
from tomoscope.scan.markup import clip, element, escape, svg, text, token_text

SERIES = 7
"""How many series have a colour of their own; further ones are grey."""

WIDTH = 720


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers that span the range: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw), 10 * power)
    first = np.ceil(low / step - 1e-9)
    return [float(round((first + i) * step, 12)) for i in range(count + 3) if (first + i) * step <= high + 1e-9 * step]


def _range(*arrays: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """The range of all finite values, padded, and through 0 where 0 is near."""
    values = np.concatenate([np.asarray(array, dtype=float).ravel() for array in arrays if len(array)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if 0 < low < 0.6 * high:
        low = 0.0
    if 0.6 * low < high < 0:
        high = 0.0
    if low == high:
        return (low, low + 1.0) if low == 0 else (low - 0.5 * abs(low), low + 0.5 * abs(low))
    pad = 0.05 * (high - low)
    return (low - pad if low != 0 else low), (high + pad if high != 0 else high)


def curve(figure: FigureRef, parts: Mapping[str, np.ndarray]) -> str:
    """Lines with bands over x, named at their ends; dashed lines for the references."""
    values, xs = parts["values"], parts["x"]
    names = [clip(name, 24) for name in figure.labels.get("series", ())]
    y_low, y_high = _range(values, parts.get("low", ()), parts.get("high", ()), list(figure.references.values()))
    left, top, height = 62.0, 12.0, 240.0
    right = 16 + 6.4 * max([len(name) for name in names] + [len(name) for name in figure.references] + [0])
    width = WIDTH - left - right
    x_low, x_high = float(np.nanmin(xs)), float(np.nanmax(xs))
    span = (x_high - x_low) or 1.0

    def px(x: float) -> float:
        return left + (x - x_low) / span * width

    def py(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * height

    body = _grid(y_low, y_high, left, width, py)
    body += _x_ticks(figure, xs, px, top + height)
    ends = []
    for name, value in figure.references.items():
        body += element("line", x1=left, x2=left + width, y1=py(value), y2=py(value), class_="reference")
        ends.append((py(value), clip(name, 24), "reference"))
    for i in range(len(values)):
        css = f"series{i}" if i < SERIES else "series-more"
        body += _band(xs, parts, i, px, py, css) + _line(xs, values[i], px, py, css)
        body += _points(xs, values[i], names[i], px, py, css)
        finite = np.flatnonzero(np.isfinite(values[i]))
        if len(finite) and (len(values) > 1 or figure.references):
            ends.append((py(float(values[i][finite[-1]])), names[i], css))
    body += _end_labels(ends, left + width + 8, top, top + height)
    body += text(left + width / 2, top + height + 38, figure.axes.get("x", ""), class_="axis", anchor="middle")
    body += _y_title(figure.axes.get("y", ""), top + height / 2)
    return svg(WIDTH, top + height + 46, body, label=f"{figure.title} {figure.caption}")


def _grid(y_low: float, y_high: float, left: float, width: float, py) -> str:
    parts = []
    for value in ticks(y_low, y_high):
        css = "zero" if value == 0 else "grid"
        parts.append(element("line", x1=left, x2=left + width, y1=py(value), y2=py(value), class_=css))
        parts.append(text(left - 8, py(value) + 3.5, _tick(value), class_="tick", anchor="end"))
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _x_ticks(figure: FigureRef, xs: np.ndarray, px, bottom: float) -> str:
    named = figure.labels.get("tick", ())
    if named:
        every = max(1, int(np.ceil(len(named) / 16)))
        marks = [(float(xs[i]), token_text(named[i])) for i in range(0, len(named), every)]
    elif len(xs) <= 16:
        marks = [(float(x), _tick(float(x))) for x in xs]
    else:
        marks = [(x, _tick(x)) for x in ticks(float(np.nanmin(xs)), float(np.nanmax(xs)), count=8)]
    return "".join(text(px(x), bottom + 18, clip(name, 9), class_="tick", anchor="middle") for x, name in marks)


def _y_title(label: str, middle: float) -> str:
    return text(13, middle, label, class_="axis", anchor="middle", transform=f"rotate(-90 13 {middle:.1f})")


def _runs(ok: np.ndarray) -> list[np.ndarray]:
    """Stretches of consecutive true places: a line breaks where a value is missing."""
    places = np.flatnonzero(ok)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []


def _line(xs: np.ndarray, ys: np.ndarray, px, py, css: str) -> str:
    parts = []
    for places in _runs(np.isfinite(ys)):
        points = " ".join(f"{px(float(xs[i])):.1f},{py(float(ys[i])):.1f}" for i in places)
        parts.append(element("polyline", points=points, class_=f"line {css}"))
    return "".join(parts)


def _band(xs: np.ndarray, parts: Mapping[str, np.ndarray], row: int, px, py, css: str) -> str:
    if "low" not in parts or "high" not in parts:
        return ""
    low, high = parts["low"][row], parts["high"][row]
    drawn = []
    for places in _runs(np.isfinite(low) & np.isfinite(high)):
        there = [f"{px(float(xs[i])):.1f},{py(float(high[i])):.1f}" for i in places]
        back = [f"{px(float(xs[i])):.1f},{py(float(low[i])):.1f}" for i in places[::-1]]
        drawn.append(element("polygon", points=" ".join(there + back), class_=f"band {css}"))
    return "".join(drawn)


def _points(xs: np.ndarray, ys: np.ndarray, name: str, px, py, css: str) -> str:
    if len(xs) > 200:
        return ""
    return "".join(
        element(
            "circle", element("title", escape(f"{name}, {_tick(float(x))}: {format_number(float(y))}")),
            cx=px(float(x)), cy=py(float(y)), r=2.6, class_=f"dot {css}",
        )
        for x, y in zip(xs, ys, strict=True)
        if np.isfinite(y)
    )  # fmt: skip


def _end_labels(ends: list[tuple[float, str, str]], x: float, top: float, bottom: float) -> str:
    """Names at the ends of their lines, moved apart where they would overlap."""
    placed: list[float] = []
    parts = []
    for y, name, css in sorted(ends):
        here = max(y, placed[-1] + 14 if placed else top)
        placed.append(here)
        parts.append((here, name, css))
    over = max(0.0, (placed[-1] - bottom) if placed else 0.0)
    return "".join(text(x, here - over + 4, name, class_=f"end {css}") for here, name, css in parts)


def bars(figure: FigureRef, parts: Mapping[str, np.ndarray]) -> str:
    """Horizontal bars with whiskers, their labels at the left; dashed lines for the references."""
    values = parts["values"]
    names = [token_text(name).replace("·", " ") for name in figure.labels.get("bar", ())]
    low, high = parts.get("low"), parts.get("high")
    x_low, x_high = _range(
        np.append(values, 0.0),
        () if low is None else low,
        () if high is None else high,
        list(figure.references.values()),
    )
    row = float(np.clip(900 / max(1, len(values)), 5, 24))
    left = 24 + 6.4 * min(26, max((len(name) for name in names), default=1))
    top = 22.0 if figure.references else 8.0
    width, height = WIDTH - left - 70, row * len(values)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * width

    body = ""
    for value in ticks(x_low, x_high):
        css = "zero" if value == 0 else "grid"
        body += element("line", x1=px(value), x2=px(value), y1=top, y2=top + height, class_=css)
        body += text(px(value), top + height + 16, _tick(value), class_="tick", anchor="middle")
    marked = {mark[0] for mark in figure.marks}
    every = max(1, int(np.ceil(11 / row)))
    for i, value in enumerate(values):
        y = top + i * row
        ends = (None, None) if low is None or high is None else (float(low[i]), float(high[i]))
        if i % every == 0 or i in marked:
            css = "tick strong" if i in marked else "tick"
            body += text(left - 8, y + row / 2 + 3.5, clip(names[i], 26), class_=css, anchor="end")
        body += _bar(float(value), ends, names[i], px, y, row, i in marked or not marked)
    for place, (name, value) in enumerate(figure.references.items()):
        body += element("line", x1=px(value), x2=px(value), y1=top - 4, y2=top + height, class_="reference")
        if place < 4:
            body += text(px(value) + 3, top - 8, name, class_="end reference")
    body += text(left + width / 2, top + height + 36, figure.axes.get("x", ""), class_="axis", anchor="middle")
    return svg(WIDTH, top + height + 44, body, label=f"{figure.title} {figure.caption}")


def _bar(value: float, ends: tuple[float | None, float | None], name: str, px, y: float, row: float, on: bool) -> str:
    if not np.isfinite(value):
        return text(px(0.0) + 4, y + row / 2 + 3.5, "not measured", class_="tick quiet")
    low, high = ends
    known = low is not None and high is not None and np.isfinite(low) and np.isfinite(high)
    interval = f" [{format_number(low)}, {format_number(high)}]" if known else ""
    title = element("title", escape(f"{name}: {format_number(value)}{interval}"))
    x, end = min(px(0.0), px(value)), max(px(0.0), px(value))
    css = "bar on" if on else "bar"
    drawn = element("rect", title, x=x, y=y + row * 0.16, width=max(0.5, end - x), height=row * 0.68, class_=css)
    if known and low is not None and high is not None:
        middle = y + row / 2
        drawn += element("line", x1=px(low), x2=px(high), y1=middle, y2=middle, class_="whisker")
        for edge in (low, high):
            drawn += element("line", x1=px(edge), x2=px(edge), y1=middle - 3, y2=middle + 3, class_="whisker")
    return drawn


def evidence(finding: Finding) -> str:
    """The estimate and its controls on one axis, each with its interval: what the verdict compares."""
    rows: list[tuple[str, Estimate, str]] = [("this model", finding.estimate, f"est {css_name(finding.verdict)}")]
    rows += [(control.name, control.estimate, "ctl") for control in finding.controls]
    fixed = finding.criterion.reference if finding.criterion else None
    drawn = [row for row in rows if row[1].value is not None]
    if not drawn:
        return ""
    numbers = [x for _, item, _ in drawn for x in (item.value, item.low, item.high) if x is not None]
    low, high = _range([*numbers, *([fixed] if fixed is not None else [])])
    left = 20 + 6.8 * min(30, max(len(name) for name, _, _ in rows))
    width, step, top = WIDTH - left - 200, 26.0, 6.0
    height = step * len(rows)

    def px(x: float) -> float:
        return left + (x - low) / (high - low) * width

    body = ""
    for value in ticks(low, high, count=4):
        css = "zero" if value == 0 else "grid"
        body += element("line", x1=px(value), x2=px(value), y1=top, y2=top + height, class_=css)
        body += text(px(value), top + height + 15, _tick(value), class_="tick", anchor="middle")
    if fixed is not None:
        body += element("line", x1=px(fixed), x2=px(fixed), y1=top, y2=top + height, class_="reference")
    for i, (name, item, css) in enumerate(rows):
        y = top + (i + 0.5) * step
        body += text(left - 10, y + 4, clip(name, 30), class_="tick strong" if i == 0 else "tick", anchor="end")
        said = f"{str(item).removesuffix(' ' + item.unit) if item.unit else item}"
        body += text(left + width + 14, y + 4, clip(said, 30), class_="tick strong" if i == 0 else "tick")
        if item.value is None:
            continue
        if item.low is not None and item.high is not None:
            body += element("line", x1=px(item.low), x2=px(item.high), y1=y, y2=y, class_=f"range {css}")
        body += element(
            "circle", element("title", escape(f"{name}: {item}")), cx=px(item.value), cy=y, r=4.5, class_=f"point {css}"
        )
    body += text(left + width / 2, top + height + 33, finding.estimate.unit, class_="axis", anchor="middle")
    label = f"{finding.estimate} against " + (
        ", ".join(f"{c.name} {c.estimate}" for c in finding.controls) or "no control"
    )
    return svg(WIDTH, top + height + (40 if finding.estimate.unit else 22), body, label=label, class_="evidence")


def glance(finding: Finding) -> str:
    """The same comparison, small enough for a line of the summary."""
    item = finding.estimate
    if item.value is None:
        return ""
    others = [control.estimate.value for control in finding.controls if control.estimate.value is not None]
    if finding.criterion is not None and finding.criterion.reference is not None:
        others.append(finding.criterion.reference)
    low, high = _range([x for x in (item.value, item.low, item.high, *others) if x is not None])
    width = 128.0

    def px(x: float) -> float:
        return 6 + (x - low) / (high - low) * (width - 12)

    css = css_name(finding.verdict)
    body = element("line", x1=2.0, x2=width - 2, y1=10.0, y2=10.0, class_="grid")
    body += "".join(element("line", x1=px(x), x2=px(x), y1=3.0, y2=17.0, class_="reference") for x in others)
    if item.low is not None and item.high is not None:
        body += element("line", x1=px(item.low), x2=px(item.high), y1=10.0, y2=10.0, class_=f"range est {css}")
    body += element("circle", cx=px(item.value), cy=10.0, r=4.0, class_=f"point est {css}")
    return svg(width, 20, body, label=f"{item}; dashed: controls", class_="glance")


def css_name(verdict: str) -> str:
    """A verdict as a class name."""
    return verdict.replace(" ", "-")
