"""The induction circuit's wiring: a previous-token head, and an induction head that composes with it by keys.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
"In-context Learning and Induction Heads" (arXiv:2209.11895).

The stream is token + position (GPT-2 form) + a constant, and three parts that begin empty: what the token before was,
what to say, and a flag. In the order of the code:

1. embeddings: a random unit code for each token; sines and cosines for each position; the constant.
2. the previous-token head: query i meets key i - 1, by positions or by rotation; copies token codes into "before".
3. the induction head: the query is the token, the key "before" less half of the token itself, so that a token never
   attends to its own kind (the first position's previous-token head sees only itself, and would be a false match);
   copies the token attended to into "out", which the unembedding reads.
4. distractors: heads that attend to a fixed distance (the token itself, or two or three before), whose output is noise.
5. noise on every weight. All that is not wired (other heads, all neurons) is this noise alone.

How it can mislead: the circuit reads one token back and no more, it has no place to rest where nothing repeats (its
attention is then spread), and no path that says anything else: a trained induction head stands among many helpers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tomoscope.phantoms.planted.host import Form, Host, balanced, rotary_offset
from tomoscope.phantoms.planted.spaces import Spaces, place_codes, shift_codes, subspaces, unit_codes

Head = tuple[int, int]

CODE, PLACE = 60, 64
TOKEN_LENGTH, PLACE_LENGTH, CONSTANT_LENGTH, WRITTEN, SAID = 8.0, 8.0, 4.0, 8.0, 12.0
"""Lengths in the stream of the token, the position, the constant, what the first head writes, and the second."""
OFFSET_SCORE, MATCH_SCORE, LOGIT = 60.0, 36.0, 16.0
"""Attention score at the right distance (at least 18 above the next), of a full match, and the logit of a full say."""
VALUE = 16.0
"""Length of a head's value vector."""
SELF = 0.5
"""How much of a token's own code is taken from its key."""


@dataclass(frozen=True)
class Layout:
    """Where the circuit's parts are: (layer, head) each, distractors with their distance."""

    previous: Head
    induction: Head
    distractors: tuple[tuple[int, int, int], ...]


def draw_layout(host: Host, choose: random.Random) -> Layout:
    """The layers and heads of one specimen; distractors share no keys with the circuit's heads."""
    size, group = host.size, host.group
    early, late = sorted(choose.sample(range(size.n_layers), 2))
    previous, induction = (early, choose.randrange(size.n_heads)), (late, choose.randrange(size.n_heads))
    distractors = []
    for layer in range(size.n_layers):
        taken = {head // group for at, head in (previous, induction) if at == layer}
        free = [head for head in range(size.n_heads) if head // group not in taken]
        distractors.append((layer, choose.choice(free), choose.choice((0, 2, 3))))
    return Layout(previous, induction, tuple(distractors))


@dataclass(frozen=True)
class Wired:
    """A host with an induction circuit in it, before noise.

    Attributes:
        host: the model being wired.
        spaces: "token", "before", "out", "place", "one", "flag" and their bases.
        codes: [vocab, CODE], a unit code for each token.
        layout: where the circuit's heads are.
    """

    host: Host
    spaces: Spaces
    codes: Tensor
    layout: Layout


def embedded_length(form: Form) -> float:
    """Length of the stream before anything is written."""
    parts = (TOKEN_LENGTH, CONSTANT_LENGTH) + ((PLACE_LENGTH,) if form == "gpt2" else ())
    return math.sqrt(sum(part**2 for part in parts))


def wire_stream(host: Host, layout: Layout, generator: torch.Generator) -> Wired:
    """Write an empty host's embeddings and unembedding: tokens, positions, the constant; what is in "out" is said."""
    form, size, vocab = host.form, host.size, len(host.embedding)
    widths = {"token": CODE, "before": CODE, "out": CODE, "one": 1, "flag": 1}
    if form == "gpt2":
        widths["place"] = PLACE
    spaces = subspaces(size.d_model, widths, generator)
    codes = unit_codes(vocab, CODE, generator)
    host.embedding.copy_(TOKEN_LENGTH * codes @ spaces["token"].T + CONSTANT_LENGTH * spaces["one"].T)
    host.unembedding.copy_(LOGIT / math.sqrt(size.d_model) * codes @ spaces["out"].T)
    if form == "gpt2":
        host.positions.copy_(PLACE_LENGTH * place_codes(size.context, PLACE) @ spaces["place"].T)
    return Wired(host, spaces, codes, layout)


def wire_induction(host: Host, layout: Layout, generator: torch.Generator) -> Wired:
    """Wire the circuit and its distractors into an empty host, without noise."""
    wired = wire_stream(host, layout, generator)
    length = embedded_length(host.form)
    wire_offset(wired, *layout.previous, 1, length)
    wire_copy(wired, *layout.previous, "before", WRITTEN, length)
    for layer, head, offset in layout.distractors:
        later = math.hypot(length, WRITTEN) if layer > layout.previous[0] else length
        wire_offset(wired, layer, head, offset, later)
    written = math.hypot(length, WRITTEN)
    wire_match(wired, *layout.induction, written, generator)
    wire_copy(wired, *layout.induction, "out", SAID, written)
    return wired


def reading(wired: Wired, part: float, length: float) -> float:
    """Length in the normed stream of a part that has length `part` in a stream of `length`."""
    return math.sqrt(wired.host.size.d_model) * part / length


def wire_offset(wired: Wired, layer: int, head: int, offset: int, length: float) -> None:
    """Let a head attend `offset` tokens back, in a stream of this length."""
    host, spaces = wired.host, wired.spaces
    if host.form == "gpt2":
        gain = balanced(OFFSET_SCORE, host.size.head_dim, reading(wired, PLACE_LENGTH, length))
        turned = shift_codes(host.size.context, PLACE, offset)
        query, key = gain * spaces["place"] @ turned, gain * spaces["place"]
    else:
        gain = balanced(OFFSET_SCORE, host.size.head_dim, reading(wired, CONSTANT_LENGTH, length))
        query, key = (gain * spaces["one"] * vector for vector in rotary_offset(host, offset))
    host.head(layer, head, query=query, key=key)


def wire_match(wired: Wired, layer: int, head: int, length: float, generator: torch.Generator) -> None:
    """Let a head attend to tokens whose predecessor is the query's token, in a stream of this length."""
    host, spaces = wired.host, wired.spaces
    width = min(CODE, host.content)
    # a rotary head holds fewer dimensions than the codes have: match on a random projection of them
    mixed = torch.linalg.qr(torch.randn(CODE, width, generator=generator)).Q * math.sqrt(CODE / width)
    gain = balanced(MATCH_SCORE, host.size.head_dim, reading(wired, TOKEN_LENGTH, length))
    query = gain * spaces["token"] @ mixed
    key = gain * (TOKEN_LENGTH / WRITTEN * spaces["before"] - SELF * spaces["token"]) @ mixed
    host.head(layer, head, query=host.placed(query), key=host.placed(key))


def wire_copy(wired: Wired, layer: int, head: int, to: str, written: float, length: float) -> None:
    """Let a head write the code of the token it attends to into a part of the stream, with length `written`."""
    spaces = wired.spaces
    gain = VALUE / reading(wired, TOKEN_LENGTH, length)
    wired.host.head(layer, head, value=gain * spaces["token"], output=written / VALUE * spaces[to].T)
