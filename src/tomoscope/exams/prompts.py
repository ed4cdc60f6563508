"""What exams of text share: text that the subject itself writes, whether it is a model of text, tokens as words.

Text for exams that need no answer (lenses) is sampled from the model: it is on its own distribution, for any language
or vocabulary, and needs no file. It can mislead: a model that writes one thing again and again is examined on that. A
corpus of the user's own can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from tomoscope.data import Corpus
from tomoscope.errors import DataError, TokenizerError
from tomoscope.exams.exam import Context


def own_text(subject: Any, *, n: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids that the subject itself writes at temperature 1, each from the start-of-text token (or a random token).

    Returns:
        n prompts of `length` tokens or fewer where the context is shorter.
    """
    from tomoscope.model.generation import generate_tokens

    start = next(
        (
            token
            for holder in (subject.tokenizer, subject.config)
            for token in (getattr(holder, "bos_token_id", None),)
            if isinstance(token, int)
        ),
        None,
    )
    vocab = subject.facts.d_vocab or 2
    generator = np.random.default_rng(seed)
    first = np.full(n, start) if start is not None and start < vocab else generator.integers(0, vocab, n)
    length = min(length, subject.facts.context or length)
    made = generate_tokens(subject, [[int(t)] for t in first], max_new_tokens=length - 1, temperature=1.0, seed=seed)
    prompts: list[tuple[int, ...]] = [(int(t), *row) for t, row in zip(first, made, strict=True)]
    kept = [row for row in prompts if len(row) >= 4]
    if len(kept) < 4:
        raise DataError(
            f"The model wrote only {len(kept)} texts of 4 tokens or more out of {n}.", remedy="Give a text."
        )
    return kept


def texts_for(context: Context, n: int) -> tuple[list[tuple[int, ...]], str]:
    """`n` texts as token ids for an exam with the options `corpus` and `length`, and what they are, for the record.

    Raises DataError where the corpus holds too few tokens.
    """
    options, seed = context.options, context.seed_for("text")
    if not options.corpus:
        return own_text(context.subject, n=n, length=options.length, seed=seed), "the model's own text"
    if context.subject.tokenizer is None:
        raise TokenizerError("A corpus is text, and the model has no tokenizer.", remedy="Leave `corpus` out.")
    length = min(options.length, context.subject.facts.context or options.length)
    rows = islice(Corpus(options.corpus).pack(context.subject.tokenizer, length, seed=seed % 2**32), n)
    texts = [tuple(int(token) for token in row.ids) for row in rows]
    if len(texts) < n:
        raise DataError(
            f"The corpus {options.corpus} gives {len(texts)} texts of {length} tokens, and {n} are needed.",
            remedy="Give more text, or ask for fewer texts.",
        )
    return texts, f"the corpus {options.corpus}"


def speaks(subject: Any) -> str:
    """Why an exam of a language model does not apply; "" where it does."""
    facts = subject.facts
    if facts.kind != "decoder" or not facts.n_layers:
        return f"the model is no decoder over tokens (it is of kind {facts.kind!r})"
    return ""


def speaks_text(subject: Any) -> str:
    """Why an exam that needs text does not apply."""
    return speaks(subject) or (
        "the model was opened without a tokenizer" if getattr(subject, "tokenizer", None) is None else ""
    )


def words(subject: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text, for figures."""
    if subject.tokenizer is None:
        return [str(i) for i in ids]
    return [subject.tokenizer.decode([int(i)]) for i in ids]
