"""A word-level tokenizer that the field's tasks accept: every word of their lists is one token.

A token is a word with the space before it, two digits, a line break or one sign; a year is a century and two digits.
How it can mislead: a text of other words is mostly the unknown token, so what a planted model does on people's text
says nothing.
"""

from __future__ import annotations

from functools import cache

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tomoscope.data.tasks import agreement, colours, facts, gendered_pronoun, greater_than, ioi, words

PIECE = r" ?[A-Za-z]+| ?\d\d|\s|[^\sA-Za-z\d]"
SPECIAL = ("<pad>", "<eos>", "<unk>")


def task_texts() -> list[str]:
    """Texts that hold every piece of the tasks' prompts and answers."""
    pairs = [word for pair in (*words.NOUNS, *words.VERBS, *words.RELATIVE_VERBS, *words.CAPITALS) for word in pair]
    known = (
        *words.FEMALE, *words.MALE, *words.PLACES, *words.GIFTS, *words.EVENTS, *words.COLOURS, *words.THINGS,
        *words.ARGUMENTS, *words.DESCRIPTION, *pairs, "he", "she",
    )  # fmt: skip
    texts = [f"So the {word}" for word in known]
    texts += [f"in {year:02d}" for year in range(100)] + [f"{year:02d}" for year in range(100)]
    texts += ["Words:\n:param self def"]
    texts += [*ioi.TEMPLATES, *gendered_pronoun.TEMPLATES, *greater_than.TEMPLATES]
    texts += [text for some in (*agreement.TEMPLATES.values(), facts.CAPITAL.templates) for text in some]
    return texts + [text for pair in colours.TEMPLATES for text in pair]


def word_tokenizer(texts: tuple[str, ...]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the pieces of these texts, in the order of their first appearance."""
    split = pre_tokenizers.Split(Regex(PIECE), "isolated")
    pieces = [piece for text in texts for piece, _ in split.pre_tokenize_str(text)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys((*SPECIAL, *pieces)))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = split
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


@cache
def task_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of the planted language models. Shared: change nothing in it."""
    return word_tokenizer(tuple(task_texts()))
