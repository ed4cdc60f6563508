"""Pictures as data: each function takes arrays and words and gives a `Figure`, which an exam hands to its context.

Nothing is drawn here. The arrays go into the ledger; the report and the viewer draw them. A figure misleads when its
scale is chosen after looking: the scales here follow from the data alone (diverging scales are symmetric about the
centre, sequential ones span the data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import Shaped

from tomoscope.errors import DataError

Array = np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Figure:
    """A picture that is not stored yet: its words, its arrays, and (for a table) its columns."""

    kind: str
    title: str
    caption: str = ""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    scale: Literal["sequential", "diverging"] = "sequential"
    center: float = 0.0
    marks: tuple[tuple[int, int], ...] = ()
    references: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    text: str = ""


def heatmap(
    values: Shaped[np.ndarray, "row column"],
    *,
    title: str,
    caption: str = "",
    rows: Sequence[Any] = (),
    columns: Sequence[Any] = (),
    row_axis: str = "layer",
    column_axis: str = "position",
    value_axis: str = "",
    scale: Literal["sequential", "diverging"] = "diverging",
    center: float = 0.0,
    marks: Sequence[tuple[SupportsIndex, SupportsIndex]] = (),
) -> Figure:
    """A matrix of numbers; cells that are NaN are drawn as "not measured". `marks` outlines the claim's cells."""
    array = _array(values, 2, "a heatmap's values")
    return Figure(
        "heatmap", title, caption, {"values": array},
        {"row": _labels(rows, array.shape[0], "row"), "column": _labels(columns, array.shape[1], "column")},
        {"y": row_axis, "x": column_axis, "value": value_axis},
        scale, center, tuple((int(row), int(column)) for row, column in marks),
    )  # fmt: skip


def curve(
    series: Mapping[str, Array],
    *,
    title: str,
    caption: str = "",
    x: Array | None = None,
    low: Mapping[str, Array] | None = None,
    high: Mapping[str, Array] | None = None,
    x_axis: str = "layer",
    y_axis: str = "",
    ticks: Sequence[Any] = (),
    references: Mapping[str, float] | None = None,
) -> Figure:
    """One or more lines over x (0, 1, 2 ... by default), each with an optional band from `low` to `high`."""
    names = tuple(series)
    if not names:
        raise DataError(f"The curve {title!r} has no series.", remedy="Give at least one.")
    values = np.stack([_array(series[name], 1, f"series {name!r}") for name in names])
    arrays = {"values": values, "x": np.arange(values.shape[1], dtype=float) if x is None else _array(x, 1, "x")}
    if len(arrays["x"]) != values.shape[1]:
        raise DataError(f"The curve {title!r} has {values.shape[1]} points and {len(arrays['x'])} x values.")
    for part, band in (("low", low), ("high", high)):
        if band:
            blank = np.full(values.shape[1], np.nan)
            arrays[part] = np.stack([_array(band.get(name, blank), 1, f"{part} of {name!r}") for name in names])
    labels = {"series": names} | ({"tick": _labels(ticks, values.shape[1], "tick")} if len(ticks) else {})
    axes = {"x": x_axis, "y": y_axis}
    return Figure("curve", title, caption, arrays, labels, axes, references=dict(references or {}))


def bars(
    values: Array,
    *,
    labels: Sequence[Any],
    title: str,
    caption: str = "",
    low: Array | None = None,
    high: Array | None = None,
    value_axis: str = "",
    label_axis: str = "",
    references: Mapping[str, float] | None = None,
    marks: Sequence[SupportsIndex] = (),
) -> Figure:
    """One bar per label, with whiskers from `low` to `high`; `references` are drawn as lines (chance, a control)."""
    arrays = {"values": _array(values, 1, "a bar chart's values")}
    for part, ends in (("low", low), ("high", high)):
        if ends is not None:
            arrays[part] = _array(ends, 1, f"the bars' {part}")
    names = {"bar": _labels(labels, len(arrays["values"]), "bar")}
    return Figure(
        "bars", title, caption, arrays, names, {"x": value_axis, "y": label_axis},
        references=dict(references or {}), marks=tuple((int(mark), 0) for mark in marks),
    )  # fmt: skip


def attention(
    pattern: Shaped[np.ndarray, "head query key"],
    *,
    tokens: Sequence[str],
    title: str,
    caption: str = "",
    heads: Sequence[Any] = (),
) -> Figure:
    """Attention patterns as small multiples, one square per head, over one prompt's tokens."""
    array = _array(pattern, 3, "an attention pattern")
    labels = {"token": _labels(tokens, array.shape[2], "token"), "head": _labels(heads, array.shape[0], "head")}
    axes = {"y": "query", "x": "key", "value": "attention"}
    return Figure("attention", title, caption, {"pattern": array}, labels, axes)


def tokens(
    tokens: Sequence[str],
    values: Array,
    *,
    title: str,
    caption: str = "",
    value_axis: str = "",
    scale: Literal["sequential", "diverging"] = "diverging",
    center: float = 0.0,
) -> Figure:
    """A text whose tokens are coloured by a value each."""
    array = _array(values, 1, "the tokens' values")
    labels = {"token": _labels(tokens, len(array), "token")}
    return Figure("tokens", title, caption, {"values": array}, labels, {"value": value_axis}, scale, center)


def graph(
    places: Shaped[np.ndarray, "node 2"],
    ends: Shaped[np.ndarray, "edge 2"],
    weights: Array,
    *,
    nodes: Sequence[str],
    levels: Sequence[str],
    title: str,
    caption: str = "",
    inputs: Sequence[str] = (),
    value_axis: str = "",
) -> Figure:
    """Nodes on levels, the lowest drawn at the bottom, and weighted edges between them.

    `places` is (level, position from 0 to 1) of each node, `ends` the nodes that each edge goes from and to, `inputs`
    by which input an edge arrives ("q", "k", "v"; "" where there is one).
    """
    put = _array(places, 2, "a graph's places")
    joined = np.asarray(ends, dtype=np.int64).reshape(-1, 2)
    arrays = {"places": put, "ends": joined, "weights": _array(weights, 1, "a graph's weights")}
    if len(joined) != len(arrays["weights"]) or (len(joined) and not 0 <= joined.min() <= joined.max() < len(put)):
        raise DataError(f"The graph {title!r} has {len(joined)} edges between {len(put)} nodes that do not fit.")
    if len(put) and not 0 <= put[:, 0].min() <= put[:, 0].max() < len(levels):
        raise DataError(f"The graph {title!r} has a node outside its {len(levels)} levels.")
    labels = {"node": _labels(nodes, len(put), "node"), "level": _labels(levels, len(levels), "level")}
    if len(inputs):
        labels["input"] = _labels(inputs, len(joined), "edge")
    return Figure("graph", title, caption, arrays, labels, {"value": value_axis})


def table(columns: Mapping[str, Sequence[Any]], *, title: str, caption: str = "") -> Figure:
    """Columns of one length, kept as Parquet; numbers stay numbers."""
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise DataError(f"The columns of the table {title!r} differ in length: {sizes}.")
    return Figure("table", title, caption, columns=dict(columns))


def text(text: str, *, title: str, caption: str = "") -> Figure:
    """A text as it is (a generated continuation), shown in a fixed-width block."""
    return Figure("text", title, caption, text=text)


def _array(values: Any, n_axes: int, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != n_axes or array.dtype.kind not in "fiub":
        raise DataError(
            f"{what[0].upper()}{what[1:]} must be numbers with {n_axes} axis(es); got {array.dtype} {array.shape}.",
            remedy="Convert tensors with .float().numpy() first.",
        )
    return np.ascontiguousarray(array.astype(np.float32))


def _labels(labels: Sequence[Any], size: int, axis: str) -> tuple[str, ...]:
    if len(labels) == 0:
        return tuple(str(index) for index in range(size))
    if len(labels) != size:
        raise DataError(f"{len(labels)} {axis} labels for {size} {axis}s.", remedy="Give one label each, or none.")
    return tuple(str(label) for label in labels)
