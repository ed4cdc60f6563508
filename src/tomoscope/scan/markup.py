"""Text into HTML and SVG, on the assumption that every string is hostile: tokens and data sets may hold anything.

Characters that HTML cannot hold, or that reorder the text around them, are made visible; everything else is escaped. No
`style` attribute and no inline handler is ever written, so the page's content security policy can forbid both.
"""

from __future__ import annotations

import html
import unicodedata
from typing import Any

REORDERING = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def visible(text: object) -> str:
    """The text with control characters as their pictures (NUL as ␀) and reordering marks by their code points."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(_shown(char) for char in plain)


def _shown(char: str) -> str:
    code = ord(char)
    if char in "\n\t":
        return char
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if code in REORDERING or unicodedata.category(char) in ("Cc", "Cs", "Cn") or code in (0x2028, 0x2029, 0xFEFF):
        return f"⟨U+{code:04X}⟩"
    return char


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(visible(text), quote=True)


def token_text(token: object) -> str:
    """A token as a label: spaces as ·, line ends and tabs by their signs, so that no two look the same."""
    return visible(str(token).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")) or "∅"


def element(name: str, content: str = "", **attributes: Any) -> str:
    """One element; `content` is markup already, attribute values are escaped here.

    An attribute of None or "" is left out; a trailing "_" is dropped from its name ("class_") and "_" becomes "-".
    """
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None and value != ""
    ]
    return f"<{name}{''.join(parts)}>{content}</{name}>"


def _short(value: Any) -> Any:
    """Numbers with at most two decimals: a tenth of a pixel is enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def svg(width: float, height: float, content: str, *, label: str, class_: str = "") -> str:
    """A picture that scales with its column and says what it is to those who cannot see it."""
    return element(
        "svg", content, viewBox=f"0 0 {width:.0f} {height:.0f}", width=round(width), height=round(height), role="img",
        aria_label=label, class_=class_,
    )  # fmt: skip


def text(x: float, y: float, content: object, *, class_: str = "", anchor: str = "", transform: str = "") -> str:
    """A line of SVG text."""
    return element(
        "text", escape(content), x=float(x), y=float(y), class_=class_, text_anchor=anchor, transform=transform
    )


def clip(content: object, length: int) -> str:
    """The text cut to a length, with an ellipsis."""
    plain = str(content)
    return plain if len(plain) <= length else plain[: max(1, length - 1)] + "…"


def anchor(id: str) -> str:
    """A finding's id as the name of its place in the page."""
    return "f-" + "".join(char if char.isascii() and char.isalnum() else "-" for char in id)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds % 60:.0f} s"
