"""From prompts to a padded batch, and from positions as a person says them to columns of it.

A prompt is a text, a sequence of token ids, or any object with `.text` and `.spans` (labelled character ranges).
Decoders are padded on the left and encoders on the right, and position ids come from the mask: transformers itself
does not do this, and a left-padded GPT-2 is then off by 2.7 in its logits. Positions always count from the prompt's
own first token.

A token belongs to a span when their character ranges overlap, so a leading space that was merged into the first word's
token belongs to it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tomoscope.errors import PromptError, TokenizerError, nearest


@runtime_checkable
class PromptLike(Protocol):
    """Anything with a text and labelled character ranges (end exclusive)."""

    @property
    def text(self) -> str:
        """The whole text."""
        ...

    @property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Label -> (start, end) characters, end exclusive."""
        ...


PromptInput = str | Sequence[int] | Tensor | PromptLike


@dataclass(frozen=True)
class Encoded:
    """One prompt as tokens.

    Attributes:
        ids: token ids.
        spans: label -> (first token, one past the last token).
        text: the text, or None where ids were given.
    """

    ids: tuple[int, ...]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    text: str | None = None


@dataclass(frozen=True)
class Batch:
    """Prompts padded to one length.

    Attributes:
        input_ids: [batch, position].
        attention_mask: [batch, position], 1 at tokens and 0 at padding.
        prompts: the encoded prompts.
        pads: [batch], columns of padding on the left of each row.
        extra: other model inputs (pixel values, token types); for images `input_ids` is None.
        indices: [batch], which of the caller's prompts each row is.
    """

    input_ids: Int[Tensor, "batch position"] | None
    attention_mask: Int[Tensor, "batch position"] | None
    prompts: tuple[Encoded, ...]
    pads: Int[Tensor, " batch"]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Int[Tensor, " batch"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.prompts):
            object.__setattr__(self, "indices", torch.arange(len(self.prompts)))

    def take(self, rows: slice | Int[Tensor, " row"]) -> Batch:
        """Some rows, at the same width; `indices` still says which prompts they are."""
        wanted = self.indices[rows].tolist()
        position = {int(index): place for place, index in enumerate(self.indices)}
        return Batch(
            None if self.input_ids is None else self.input_ids[rows],
            None if self.attention_mask is None else self.attention_mask[rows],
            tuple(self.prompts[position[index]] for index in wanted),
            self.pads[rows],
            {name: value[rows] for name, value in self.extra.items()},
            self.indices[rows],
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt.ids) for prompt in self.prompts]

    @property
    def width(self) -> int:
        """Columns of the batch."""
        return int(self.input_ids.shape[1]) if self.input_ids is not None else max(self.lengths, default=0)

    @property
    def padded(self) -> bool:
        """Whether any row holds padding."""
        return any(length != self.width for length in self.lengths)

    @property
    def mask(self) -> Bool[Tensor, "batch position"]:
        """True at tokens, False at padding."""
        if self.attention_mask is None:
            return torch.ones(len(self), self.width, dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """[batch], the column of each prompt's last token."""
        return self.pads + torch.tensor(self.lengths) - 1

    def columns(self, at: int | str | Sequence[int | str] | None) -> tuple[Int[Tensor, "batch position"] | None, bool]:
        """Columns of the padded batch for positions as a person says them.

        Args:
            at: None for all; a position counted from the prompt's first token, negative from its end; "last"; a span's
                label ("subject": its last token; "subject.first", "subject.all"); or a list of these.

        Returns:
            [batch, position] columns (None for all), and whether `at` was one position, which drops the axis.

        Raises:
            PromptError: a position outside a prompt, an unknown label, or spans of unequal length asked for with
            ".all".
        """
        if at is None:
            return None, False
        single = isinstance(at, int | str) and not (isinstance(at, str) and at.endswith(".all"))
        wanted = [at] if isinstance(at, int | str) else list(at)
        rows = [[column for one in wanted for column in self._one(row, one)] for row in range(len(self))]
        if len({len(row) for row in rows}) > 1:
            raise PromptError(
                f"at={at!r} covers different numbers of tokens in different prompts "
                f"({sorted({len(r) for r in rows})}).",
                remedy="Ask for one token of the span (.first, .last), or read the prompts in groups of equal length.",
            )
        return torch.tensor(rows, dtype=torch.long).reshape(len(self), -1), single

    def _one(self, row: int, at: int | str) -> list[int]:
        length, pad, spans = len(self.prompts[row].ids), int(self.pads[row]), self.prompts[row].spans
        if isinstance(at, str) and at != "last":
            label, _, which = at.partition(".")
            if label not in spans:
                raise PromptError(
                    f"Prompt {row} has no span {label!r}; it has {sorted(spans) or 'none'}.",
                    remedy=nearest(label, spans) or 'Label a span in the prompt: "The {subject:Space Needle} is in".',
                )
            first, end = spans[label]
            choice = {"": [end - 1], "last": [end - 1], "first": [first], "all": list(range(first, end))}.get(which)
            if choice is None:
                raise PromptError(f"at={at!r}: .{which} is unknown.", remedy="Write .first, .last or .all.")
            return [pad + position for position in choice]
        position = length - 1 if at == "last" else int(at)
        position = position + length if position < 0 else position
        if not 0 <= position < length:
            raise PromptError(f"at={at!r} is outside prompt {row}, which has {length} tokens.")
        return [pad + position]


def encode(prompt: PromptInput, tokenizer: Any, *, context: int | None = None, row: int = 0) -> Encoded:
    """Turn one prompt into tokens.

    Raises:
        PromptError: an empty prompt, one longer than the model's context, or a span that covers no token.
        TokenizerError: text for a model without a tokenizer.
    """
    if isinstance(prompt, Encoded):
        encoded = prompt
    elif isinstance(prompt, str | PromptLike):
        encoded = _encode_text(prompt, tokenizer, row)
    else:
        encoded = Encoded(tuple(int(token) for token in prompt))
    if not encoded.ids:
        raise PromptError(f"Prompt {row} is empty: there is no token to look at.", remedy="Give at least one token.")
    if context is not None and len(encoded.ids) > context:
        raise PromptError(
            f"Prompt {row} has {len(encoded.ids)} tokens, but the model's context is {context}.",
            remedy="Shorten the prompt or split it.",
        )
    return encoded


def _encode_text(prompt: str | PromptLike, tokenizer: Any, row: int) -> Encoded:
    given = getattr(prompt, "tokens", None)
    if given is not None:
        # a prompt that was made from token ids says so; its spans then count tokens already
        return Encoded(tuple(int(token) for token in given), {})
    text, spans = (prompt, {}) if isinstance(prompt, str) else (prompt.text, dict(prompt.spans))
    if tokenizer is None:
        raise TokenizerError(
            f"Prompt {row} is a text, but the model was opened without a tokenizer.",
            remedy="Give open_model(..., tokenizer=...) or put tokenizer.json beside the weights, or give token ids.",
        )
    if not spans:
        return Encoded(tuple(tokenizer(text, verbose=False)["input_ids"]), {}, text)
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError("Labelled spans need a fast tokenizer (tokenizer.json).", remedy="Convert the tokenizer.")
    out = tokenizer(text, return_offsets_mapping=True, verbose=False)
    offsets, ids = out["offset_mapping"], out["input_ids"]
    tokens: dict[str, tuple[int, int]] = {}
    for label, (start, end) in spans.items():
        hit = [i for i, (low, high) in enumerate(offsets) if low < end and high > start]
        if not hit:
            raise PromptError(f"The span {label!r} of prompt {row} covers no token.", remedy="Check its offsets.")
        tokens[label] = (hit[0], hit[-1] + 1)
    return Encoded(tuple(ids), tokens, text)


def collate(prompts: Iterable[Encoded], *, pad_id: int, left: bool, device: torch.device) -> Batch:
    """Pad encoded prompts to one length, on the left for decoders."""
    prompts = tuple(prompts)
    width = max((len(prompt.ids) for prompt in prompts), default=0)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    pads = torch.tensor([width - len(prompt.ids) if left else 0 for prompt in prompts], dtype=torch.long)
    for row, prompt in enumerate(prompts):
        span = slice(int(pads[row]), int(pads[row]) + len(prompt.ids))
        ids[row, span] = torch.tensor(prompt.ids, dtype=torch.long)
        mask[row, span] = 1
    return Batch(ids.to(device), mask.to(device), prompts, pads)
