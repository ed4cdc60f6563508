"""A tiny model and texts of unequal lengths for the tests of activations."""

from __future__ import annotations

from functools import cache

import torch
import transformers

from tests.tiny import tokenizer
from tests.zoo import randomise
from tomoscope.model import Subject, build_subject


@cache
def subject() -> Subject:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=len(tokenizer()), bos_token_id=0, eos_token_id=0
    )
    model = randomise(transformers.GPT2LMHeadModel(config), 3).eval()
    return build_subject(model, name="tiny", tokenizer=tokenizer())


def ids(n: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 50, (n,), generator=generator).tolist()
    return [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]
