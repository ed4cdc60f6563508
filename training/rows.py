"""Rows of token ids to train on: packed documents of the micro-world, and random tokens that repeat.

A batch is a pure function of (seed, split, step), so a run that was killed goes on with the same rows. Rows of random
tokens make copying from context worth learning: what follows a token's earlier occurrence follows it again. They are
drawn from a pool that grows from few tokens to all, because a circuit of two layers forms soonest where few tokens have
to be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import torch

from tomoscope.phantoms.world import World, document
from tomoscope.phantoms.world.text import SHARES


def random_row(random: Random, pool: range | list[int], context: int) -> list[int]:
    """A segment of different random tokens again and again, with a few others between, to the end of the row."""
    segment = random.sample(pool, random.randint(3, min(24, len(pool) // 2)))
    row = random.choices(pool, k=random.randint(0, context // 8))
    while len(row) < context:
        row += segment
        row += random.choices(pool, k=random.choice((0, 0, 0, 1, 3)))
    return row[:context]


def pack(
    random: Random, world: World, tokenizer: Any, rows: int, context: int, shares: Mapping[str, float] = SHARES
) -> list[list[int]]:
    """Rows of whole documents, each after <|endoftext|>; the last document of a row is cut.

    Half of the rows begin without it, as prompts often do.
    """
    end = tokenizer.eos_token_id
    packed: list[list[int]] = []
    pool: list[list[int]] = []
    while len(packed) < rows:
        row = [end] if random.random() < 0.5 else []
        while len(row) < context:
            if not pool:
                texts = [document(world, random, shares) for _ in range(2 * rows)]
                pool = tokenizer(texts, add_special_tokens=False).input_ids
            row += [*pool.pop(), end]
        packed.append(row[:context])
    return packed


def batch(
    world: World,
    tokenizer: Any,
    key: str,
    *,
    rows: int,
    context: int,
    random_share: float,
    pool: int,
    shares: Mapping[str, float] = SHARES,
) -> torch.Tensor:
    """Token ids [row, position] of one step; `key` seeds it; random tokens come from the first `pool` of a fixed
    shuffle of the vocabulary.
    """
    random = Random(key)
    n_random = sum(random.random() < random_share for _ in range(rows))
    tokens = shuffled(len(tokenizer))[:pool]
    made = [random_row(random, tokens, context) for _ in range(n_random)]
    return torch.tensor(made + pack(random, world, tokenizer, rows - n_random, context, shares))


_SHUFFLED: dict[int, list[int]] = {}


def shuffled(vocabulary: int) -> list[int]:
    """Every token but the first (the end of text), in a fixed random order."""
    if vocabulary not in _SHUFFLED:
        _SHUFFLED[vocabulary] = Random("pool").sample(range(1, vocabulary), vocabulary - 1)
    return _SHUFFLED[vocabulary]
