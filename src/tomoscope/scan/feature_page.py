"""The page of one feature: what it fires on and what it does, as HTML that holds no code.

Tokens and labels are hostile input: every string goes through `scan.markup`. The shade of a token is a class, not a
style, so the page's content security policy forbids scripts and inline styles alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tomoscope.scan.markup import element, escape, token_text, visible
from tomoscope.scan.page import document

SHADES = 10
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.3rem}h2{font-size:1rem;margin-top:1.5rem}table{border-collapse:collapse}
td,th{padding:.1rem .8rem .1rem 0;text-align:left;vertical-align:top}
.text{font:13px/1.7 ui-monospace,monospace;white-space:pre-wrap;margin:.4rem 0;
overflow-wrap:anywhere}.peak{text-decoration:underline}.dim{color:#666}svg{background:#f6f6f4}rect{fill:#b5532a}
""" + "".join(f".a{i}{{background:color-mix(in srgb,#e8742c {i * 100 // SHADES}%,#fff)}}" for i in range(1, SHADES + 1))


def feature_page(card: Mapping[str, Any]) -> str:
    """One feature as a whole HTML document.

    Args:
        card: from `FeatureBook.card`.
    """
    latent, label = int(card["latent"]), card.get("label") or "unlabelled"
    title = f"Feature {latent}: {visible(label)}"
    parts = [element("h1", escape(title)), element("p", escape(_where(card)), class_="dim"), _numbers(card)]
    parts.append(_section("How strongly it fires", _bars(card["histogram"])))
    parts.append(_section("Where in the corpus", _bars(card["segments"])))
    parts.append(_section("What it does to the next token", _logits(card)))
    parts.append(_section("On which tokens", _counts(card)))
    parts.append(_section("Beside which features", _neighbours(card)))
    top = float(card["max"])
    for name, some in card["contexts"].items():
        head = "Strongest texts" if name == "top" else f"Texts from part {int(name) + 1} of its range"
        parts.append(_section(head, "".join(_context(one, top) for one in some)))
    return document(title, "".join(parts), style=STYLE)


def _where(card: Mapping[str, Any]) -> str:
    return f"{card['dictionary'] or 'a dictionary'} at {card['site']} of {card['model']}, {card['n_tokens']:,} tokens"


def _section(head: str, content: str) -> str:
    return element("h2", escape(head)) + content


def _row(*cells: str) -> str:
    return element("tr", "".join(element("td", cell) for cell in cells))


def _numbers(card: Mapping[str, Any]) -> str:
    score = card.get("score")
    rows = [
        ("fires on", f"{int(card['fires']):,} tokens ({card['density']:.3%})"),
        ("largest activation", f"{card['max']:.4g}"), ("mean where it fires", f"{card['mean']:.4g}"),
        ("entropy of its tokens", f"{card['token_entropy']:.2f} bits"),
        ("share of its commonest token", f"{card['single_token']:.0%}"),
    ]  # fmt: skip
    if score is not None:
        rows.append(("score of the label", f"{score:.2f}"))
    return element("table", "".join(_row(escape(name), escape(value)) for name, value in rows))


def _bars(counts: Sequence[int]) -> str:
    most, width, height = max([1, *counts]), 8, 60
    bars = "".join(
        f'<rect x="{i * width}" y="{height - round(height * n / most)}" width="{width - 1}" '
        f'height="{round(height * n / most)}"></rect>'
        for i, n in enumerate(int(count) for count in counts)
    )
    return element("svg", bars, width=str(width * len(counts)), height=str(height), role="img")


def _logits(card: Mapping[str, Any]) -> str:
    if not card["raised"]:
        return element("p", "not measured: the dictionary does not write to the stream", class_="dim")
    rows = []
    for up, by, down, less in zip(
        card["raised_text"], card["raised_by"], card["lowered_text"], card["lowered_by"], strict=True
    ):
        rows.append(_row(escape(token_text(up)), f"+{by:.3g}", escape(token_text(down)), f"{less:.3g}"))
    return element("table", "".join(rows))


def _counts(card: Mapping[str, Any]) -> str:
    pairs = zip(card["tokens_text"], card["token_counts"], strict=False)
    return element("table", "".join(_row(escape(token_text(token)), f"{int(n):,}") for token, n in pairs))


def _neighbours(card: Mapping[str, Any]) -> str:
    near = [f"{i} (cosine {c:.2f})" for i, c in zip(card["near"], card["near_cosine"], strict=True)]
    fires = [f"{i} ({j:.0%})" for i, j in zip(card["cofire"], card["cofire_jaccard"], strict=True) if i >= 0]
    return element(
        "table",
        _row("nearest directions", escape(", ".join(near) or "none"))
        + _row("fire on the same tokens", escape(", ".join(fires) or "none")),
    )


def _context(one: Mapping[str, Any], top: float) -> str:
    spans = []
    for i, (token, value) in enumerate(zip(one["tokens"], one["values"], strict=True)):
        shade = min(SHADES, max(1, round(SHADES * value / top))) if value > 0 and top > 0 else 0
        names = " ".join([*([f"a{shade}"] if shade else []), *(["peak"] if i == one["peak"] else [])])
        spans.append(element("span", escape(token), class_=names, title=f"{value:.4g}" if value else None))
    return element("div", "".join(spans), class_="text")
