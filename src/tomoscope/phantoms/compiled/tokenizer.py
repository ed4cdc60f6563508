"""The tokenizer of a compiled model: one token a word, words apart by spaces, BOS first.

`tokens` of a program are values (strings, numbers, brackets); their text is `str(value)`. Answers that are not in the
vocabulary (counts, "True") are tokens too, which only the logits have a use for. A program whose answer is a number
gives it as the logit of VALUE; ZERO's logit is always 0, so that the difference of the two is the number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from tomoscope.errors import DataError, PromptError, nearest

BOS, PAD, VALUE, ZERO = "<bos>", "<pad>", "<value>", "<zero>"


@dataclass(frozen=True)
class Words:
    """The words of a model: `texts` by token id, ids of vocabulary and of answers by value (empty for numbers)."""

    texts: tuple[str, ...]
    vocabulary: dict[Hashable, int]
    answers: dict[Hashable, int]

    def parse(self, prompt: str | Sequence[Hashable], max_length: int) -> tuple[Hashable, ...]:
        """The values of a prompt, given as text or as values.

        Raises PromptError for no token, an unknown one, and more than the model was compiled for.
        """
        by_text = {str(value): value for value in self.vocabulary}
        values = tuple(by_text.get(word, word) for word in prompt.split()) if isinstance(prompt, str) else tuple(prompt)
        if not values:
            raise PromptError("The prompt has no tokens.", remedy="Give at least one.")
        for value in values:
            if value not in self.vocabulary:
                known = ", ".join(by_text)
                hint = nearest(str(value), by_text) or f"The vocabulary is: {known}."
                raise PromptError(f"{value!r} is not in the program's vocabulary.", remedy=hint)
        if len(values) > max_length:
            raise PromptError(
                f"The prompt has {len(values)} tokens; the program was compiled for at most {max_length}.",
                remedy="Compile it again with a greater max_length.",
            )
        return values

    def text(self, values: Sequence[Hashable]) -> str:
        """Values as the text of a prompt."""
        return " ".join(str(value) for value in values)


def make_words(vocabulary: Sequence[Hashable], answers: Sequence[Hashable] | None) -> Words:
    """Words for a vocabulary and the categories a program answers with (None: it answers with numbers).

    Raises DataError for a vocabulary that is empty, repeats a text, or has a word with spaces or of a special token.
    """
    texts = [str(value) for value in vocabulary]
    wrong = [text for text in texts if not text or text.split() != [text] or text in (BOS, PAD, VALUE, ZERO)]
    if wrong or not texts or len(set(texts)) < len(texts):
        what = f"has {wrong[0]!r}" if wrong else "is empty" if not texts else "has two tokens with one text"
        raise DataError(
            f"The vocabulary {what}.",
            remedy="Give at least one token, each a word of its own without spaces or special tokens.",
        )
    ids = {text: i for i, text in enumerate([BOS, PAD, *texts])}
    if answers is None:
        ids |= {VALUE: len(ids), ZERO: len(ids) + 1}
    for answer in answers or ():
        ids.setdefault("_".join(str(answer).split()), len(ids))
    out = {answer: ids["_".join(str(answer).split())] for answer in answers or ()}
    if len(set(out.values())) < len(out):
        raise DataError(
            "Two of the program's answers have the same text.", remedy="Map them to values that print differently."
        )
    return Words(tuple(ids), {value: ids[str(value)] for value in vocabulary}, out)


def make_tokenizer(words: Words, n_positions: int) -> Any:
    """A `PreTrainedTokenizerFast` of these words; it refuses words it doesn't know."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {text: i for i, text in enumerate(words.texts)}
    backend = Tokenizer(models.WordLevel(ids))  # no unknown token: an unknown word is an error, not a guess
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, pad_token=PAD, padding_side="right",
        model_max_length=n_positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
