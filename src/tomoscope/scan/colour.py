"""Colour scales that are safe for the colour-blind, in a light and a dark version, and pictures of them as PNG.

A value becomes one of `LEVELS` steps; the page's style sheet gives each step its colour, so the same picture is right
on white and on black. Scales are interpolated in OKLab (Ottosson 2020), where equal steps look equal. More colour means
more value: the ends of the diverging scale differ in hue (blue, orange) and the middle is the colour of the page.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8

LEVELS = 41
MISSING = LEVELS  # the step of a value that was not measured

ANCHORS = {
    ("sequential", "light"): ("#f7f5f0", "#d3e4e1", "#9ccbcb", "#5aa3b8", "#30749f", "#1f4778", "#14234b"),
    ("sequential", "dark"): ("#1b1e23", "#1d3448", "#20566f", "#2d7e93", "#59a9a8", "#9dd0ba", "#eef5da"),
    ("diverging", "light"): ("#123f78", "#3f7cb4", "#a3c5df", "#f7f5f0", "#f2c48d", "#d27c2c", "#8f4308"),
    ("diverging", "dark"): ("#9dd0ff", "#4b8fcd", "#27506f", "#1b1e23", "#6b4420", "#c67a2b", "#ffc37d"),
}
MISSING_COLOUR = {"light": "#e4e1da", "dark": "#34383f"}

_TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.808675766]])  # fmt: skip


def palette(scale: str, mode: str) -> UInt8[np.ndarray, "level rgb"]:
    """The colours of all steps, and of "missing" as the last row."""
    anchors = np.array([[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in ANCHORS[scale, mode]])
    linear = np.where(anchors <= 0.04045, anchors / 12.92, ((anchors + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    places = np.linspace(0, len(anchors) - 1, LEVELS)
    steps = np.stack([np.interp(places, range(len(anchors)), lab[:, axis]) for axis in range(3)], axis=1)
    back = (steps @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    clipped = np.clip(back, 0, 1)
    encoded = np.where(clipped <= 0.0031308, clipped * 12.92, 1.055 * clipped ** (1 / 2.4) - 0.055)
    missing = [int(MISSING_COLOUR[mode][i : i + 2], 16) for i in (1, 3, 5)]
    return np.vstack([np.round(encoded * 255), missing]).astype(np.uint8)


def style_sheet() -> str:
    """CSS that gives each step's class its colour: `s0` to `s40` sequential, `d0` to `d40` diverging, `na` missing."""

    def rules(mode: str) -> str:
        lines = []
        for scale in ("sequential", "diverging"):
            colours = palette(scale, mode)
            lines += [f".{scale[0]}{i}{{--c:#{bytes(colours[i]).hex()}}}" for i in range(LEVELS)]
        return "".join(lines) + f".na{{--c:{MISSING_COLOUR[mode]}}}"

    return rules("light") + "@media (prefers-color-scheme:dark){" + rules("dark") + "}"


class Scale:
    """Values to steps. Diverging scales are symmetric about the centre; sequential ones span the data."""

    def __init__(self, values: np.ndarray, *, kind: str, center: float = 0.0) -> None:
        finite = values[np.isfinite(values)]
        self.kind = kind
        if kind == "diverging":
            reach = float(np.max(np.abs(finite - center), initial=0.0)) or 1.0
            self.low, self.high = center - reach, center + reach
        else:
            self.low = min(0.0, float(finite.min())) if len(finite) else 0.0
            self.high = float(finite.max()) if len(finite) else 1.0
            self.high = self.high if self.high > self.low else self.low + 1.0

    def steps(self, values: Float[np.ndarray, "*axes"]) -> UInt8[np.ndarray, "*axes"]:
        """The step of each value; MISSING where it is not finite."""
        place = (np.asarray(values, dtype=float) - self.low) / (self.high - self.low)
        safe = np.where(np.isfinite(place), place, 0.0)
        steps = np.clip(np.round(safe * (LEVELS - 1)), 0, LEVELS - 1)
        return np.where(np.isfinite(place), steps, MISSING).astype(np.uint8)

    def css(self, step: int) -> str:
        """The class of a step, with `hi` where text on it must be inverted."""
        if step == MISSING:
            return "q na"
        strong = abs(step - LEVELS // 2) > 12 if self.kind == "diverging" else step > 22
        return f"q {self.kind[0]}{step}{' hi' if strong else ''}"


def png(steps: UInt8[np.ndarray, "row column"], *, scale: str, mode: str) -> bytes:
    """A PNG with one pixel per value, indexed by step."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = steps.shape
    rows = np.hstack([np.zeros((height, 1), np.uint8), steps]).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", palette(scale, mode).tobytes())
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def data_uri(image: bytes) -> str:
    """A PNG as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def shrink(
    values: Float[np.ndarray, "row column"], *, limit: int, center: float
) -> tuple[Float[np.ndarray, "small_row small_column"], int, int]:
    """The matrix with at most `limit` rows and columns: each pixel keeps the value furthest from the centre.

    Returns it with how many rows and columns went into one pixel.
    """
    strides = [-(-size // limit) for size in values.shape]
    for axis, stride in enumerate(strides):
        if stride == 1:
            continue
        pad = -values.shape[axis] % stride
        widths = [(0, pad if place == axis else 0) for place in range(2)]
        padded = np.pad(values, widths, constant_values=np.nan)
        moved = np.moveaxis(padded, axis, 0).reshape(-1, stride, padded.shape[1 - axis])
        distance = np.where(np.isfinite(moved), np.abs(moved - center), -1.0)
        picked = np.take_along_axis(moved, distance.argmax(axis=1)[:, None], axis=1)[:, 0]
        values = np.moveaxis(picked, 0, axis)
    return values, strides[0], strides[1]
