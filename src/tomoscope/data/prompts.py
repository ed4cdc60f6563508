"""Prompts with labelled spans: "The {subject:Space Needle} is in" is a text, and where its subject stands.

A span is a range of characters of the text; which tokens it covers depends on the tokenizer and is found at encoding,
by the fast tokenizer's character offsets: a token belongs to a span when their character ranges overlap, so a token
that carries the leading space counts. How it can mislead: a token may straddle the span's edge (it is counted in),
several byte tokens may share one character (all are counted in), and special tokens cover no characters (never counted
in).

Steps: `Prompt.parse` takes the braces out and records the spans, `Prompt.encode` makes token ids and token ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tomoscope.errors import PromptError, TokenizerError

Span = tuple[int, int]
"""(start, end), end exclusive."""

_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PIECE = re.compile(r"\{\{|\}\}|\{|\}|[^{}]+")
_BRACES = "Write {label:words} for a span, and {{ or }} for a brace itself."


@dataclass(frozen=True)
class Encoded:
    """A prompt's token ids, and the token range of each of its spans.

    `ids` are token ids in order (special tokens that the tokenizer adds included); `spans` maps a label to
    (first token, one past the last token); `offsets` gives each token's character range, (0, 0) for special tokens.
    """

    ids: tuple[int, ...]
    spans: dict[str, Span]
    offsets: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompt:
    """A text with labelled spans of characters.

    `spans` maps a label (letters, digits, underscores) to (start, end) in characters of `text`, end exclusive. `tokens`
    fixes the token ids beforehand, for prompts that are not any text's usual tokens; such a prompt has no spans.
    Raises PromptError for an empty text, a bad label, and a span that is empty or outside the text.
    """

    text: str
    spans: Mapping[str, Span] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", {label: (int(a), int(b)) for label, (a, b) in self.spans.items()})
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(int(token) for token in self.tokens))
            if not self.tokens:
                raise PromptError("The prompt has no tokens.", remedy="Give at least one token id.")
            if self.spans:
                raise PromptError(
                    "A prompt made of token ids has no spans of characters.", remedy="Give positions by index instead."
                )
        elif not self.text:
            raise PromptError("The prompt is empty.", remedy="Give at least one character of text.")
        for label, (start, end) in self.spans.items():
            if not _LABEL.fullmatch(label):
                raise PromptError(
                    f"{label!r} is not a span's label.",
                    remedy="Use letters, digits and underscores, not first a digit.",
                )
            if not 0 <= start < end <= len(self.text):
                raise PromptError(
                    f"The span {label!r} is characters {start} to {end}, of a text of {len(self.text)}.",
                    remedy="A span starts inside the text and ends after its start.",
                )

    def __str__(self) -> str:
        return self.text

    def __hash__(self) -> int:
        return hash((self.text, tuple(sorted(self.spans.items())), self.tokens))

    @classmethod
    def parse(cls, marked: str) -> Prompt:
        """Read a text in which "{label:words}" marks a span and "{{", "}}" stand for braces; spans do not nest here.

        Raises PromptError for a brace that is not closed or opened, a span without label or words, and a label used
        twice.
        """
        text, spans = "", {}
        label, start = "", -1
        pieces = _PIECE.findall(marked)
        for piece in pieces:
            if piece == "{":
                if start >= 0:
                    raise PromptError(f"A span opens inside the span {label!r} of {marked!r}.", remedy=_BRACES)
                label, start = "", len(text)
            elif piece == "}":
                if start < 0:
                    raise PromptError(f"A span closes that was never opened in {marked!r}.", remedy=_BRACES)
                _add_span(spans, label, (start, len(text)), marked)
                start = -1
            elif start >= 0 and not label:
                label, colon, rest = piece.partition(":")
                if not colon or not _LABEL.fullmatch(label):
                    raise PromptError(f"{{{piece} has no label in {marked!r}.", remedy=_BRACES)
                text += rest
            else:
                text += {"{{": "{", "}}": "}"}.get(piece, piece)
        if start >= 0:
            raise PromptError(f"The span {label!r} is never closed in {marked!r}.", remedy=_BRACES)
        return cls(text, spans)

    def marked(self) -> str:
        """The text with its spans in braces, which `parse` reads back.

        Raises PromptError where spans overlap, and where a closing brace of the text comes right after a span: no marks
        tell it from the span's own last character.
        """
        out, position = "", 0
        for label, (start, end) in sorted(self.spans.items(), key=lambda item: item[1]):
            if start < position:
                raise PromptError(
                    f"The span {label!r} overlaps another one, and braces do not nest.",
                    remedy="Use text and spans apart.",
                )
            if self.text[end : end + 1] == "}":
                raise PromptError(
                    f"A closing brace comes right after the span {label!r}, which marks can't tell from its end.",
                    remedy="Use text and spans apart.",
                )
            out += f"{_escape(self.text[position:start])}{{{label}:{_escape(self.text[start:end])}}}"
            position = end
        return out + _escape(self.text[position:])

    def words(self, label: str) -> str:
        """The text of one span. Raises PromptError for a label that is not there."""
        if label not in self.spans:
            raise PromptError(
                f"The prompt has no span {label!r}.", remedy=f"It has {', '.join(map(repr, self.spans)) or 'none'}."
            )
        start, end = self.spans[label]
        return self.text[start:end]

    def encode(self, tokenizer: Any) -> Encoded:
        """Token ids and token ranges of the spans, as the tokenizer makes them by default (special tokens included).

        Raises PromptError where the text gives no tokens, where a span covers none, and where spans are asked of a
        tokenizer that keeps no character offsets.
        """
        if self.tokens is not None:
            return Encoded(self.tokens, {})
        fast = bool(getattr(tokenizer, "is_fast", False))
        if self.spans and not fast:
            raise PromptError(
                f"{type(tokenizer).__name__} keeps no character offsets, which spans need.",
                remedy="Open the model with its fast tokenizer (tokenizer.json), or give positions by index.",
            )
        encoding = read_text(tokenizer, self.text, **({"return_offsets_mapping": True} if fast else {}))
        ids = tuple(int(token) for token in encoding["input_ids"])
        if not ids:
            raise PromptError(
                f"The text {self.text!r} gives no tokens.", remedy="Give a text that the tokenizer knows."
            )
        offsets = tuple((int(a), int(b)) for a, b in encoding["offset_mapping"]) if fast else ()
        return Encoded(ids, {label: self._token_range(label, offsets) for label in self.spans}, offsets)

    def _token_range(self, label: str, offsets: Sequence[Span]) -> Span:
        start, end = self.spans[label]
        covered = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not covered:
            raise PromptError(
                f"The span {label!r} ({self.text[start:end]!r}) covers no token of {self.text!r}.",
                remedy="Mark at least one character that the tokenizer keeps (some drop spaces).",
            )
        return covered[0], covered[-1] + 1


def read_text(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """What a tokenizer makes of a text. Raises TokenizerError where it knows no token for a part of it, and has none
    for what is unknown (a word-level tokenizer without one ends in a bare exception of its library).
    """
    try:
        return tokenizer(text, **options)
    except Exception as error:
        if type(error) is not Exception:  # the library's own is bare
            raise
        said = text if isinstance(text, str) else ", ".join(text[:3])
        raise TokenizerError(
            f"The tokenizer can't read {said[:80]!r}: {error}.",
            remedy="Give text of its own vocabulary, or a tokenizer with a token for what is unknown.",
        ) from error


def as_prompt(source: Prompt | str | Sequence[int]) -> Prompt:
    """A Prompt from what users give: a Prompt, a text (braces mean themselves), or token ids."""
    if isinstance(source, Prompt):
        return source
    if isinstance(source, str):
        return Prompt(source)
    return Prompt("", tokens=tuple(source))


def mark(text: str, words: Iterable[tuple[str, str]]) -> Prompt:
    """A prompt whose spans are the first place of each (label, words) in the text.

    Raises PromptError where one is not there.
    """
    spans = {}
    for label, wanted in words:
        start = text.find(wanted)
        if start < 0 or not wanted:
            raise PromptError(
                f"{wanted!r} (span {label!r}) is not in {text!r}.", remedy="Mark words that the text has."
            )
        spans[label] = (start, start + len(wanted))
    return Prompt(text, spans)


def _add_span(spans: dict[str, Span], label: str, span: Span, marked: str) -> None:
    if not label or span[0] == span[1]:
        raise PromptError(f"The span {label!r} is empty in {marked!r}.", remedy=_BRACES)
    if label in spans:
        raise PromptError(f"The label {label!r} is used twice in {marked!r}.", remedy="Give each span its own label.")
    spans[label] = span


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
