"""Small models with a tokenizer, a corpus, and facts to write into them."""

from __future__ import annotations

from functools import cache

import torch

from tests.tiny import tokenizer
from tests.zoo import ZOO
from tomoscope.model import Subject, build_subject
from tomoscope.treat.edit.requests import EditRequest

FAMILIES = ("gpt2", "gpt_neox", "gptj", "llama", "qwen2", "gemma2")
CONTEXTS = ("{}", "The sun was out. {}", "I like to read. {}")
FACTS = (
    EditRequest("The friend of {} is called", "Mary", "John", case="0"),
    EditRequest("{} plays with", "Tom", "Anna Smith", case="1"),
    EditRequest("Every day {} gives a book to", "Michael", "Jessica", case="2"),
)


@cache
def subject(family: str) -> Subject:
    """A tiny random model of a family; the tests leave it as it was.

    In double precision, but for Gemma 2, whose masks transformers makes in single precision.
    """
    dtype = torch.float32 if family == "gemma2" else torch.float64
    model = ZOO[family].build(vocab=len(tokenizer())).to(dtype)
    return build_subject(model, tokenizer=tokenizer(), name=family)


def corpus(count: int = 60) -> list[list[int]]:
    """Random token ids."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, 1200, (count, 20), generator=draw).tolist()
