"""A duplicate-token head: it attends to the earlier copy of the token it stands at, and says that token again.

Source: Wang et al. 2022 (arXiv:2211.00593), section 3.1, whose duplicate-token heads tell the IOI circuit that a name
came twice. The query and the key are the token's code; a second, positional part of the same head takes the token's
own position away, so that a first occurrence is passed over for an earlier one where there is one.

On the card: the head's role and that it copies; no ability, since saying a token again is none of the field's tasks.
The null has the same weights in random order. How it can mislead: in trained models such a head feeds others and says
nothing itself; where no token came twice, this one attends to itself.
"""

from __future__ import annotations

import math

import torch

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import abilities, circuit, denied, node, scramble
from tomoscope.phantoms.planted.circuit import (
    CODE,
    CONSTANT_LENGTH,
    PLACE,
    PLACE_LENGTH,
    SAID,
    TOKEN_LENGTH,
    Head,
    Layout,
    Wired,
    embedded_length,
    reading,
    wire_copy,
    wire_stream,
)
from tomoscope.phantoms.planted.host import Form, Host, Size, balanced, rotary_offset
from tomoscope.phantoms.planted.induction import FORMS, NOISE
from tomoscope.phantoms.planted.induction import SAID as NAMES
from tomoscope.phantoms.planted.spaces import generator_for, random_for
from tomoscope.phantoms.planted.words import task_tokenizer

CONTENT, MATCH, SELF = 40, 60.0, 16.0
"""Dimensions of the head for content; the attention score of a match, and what the own position loses."""


def wire_duplicate(wired: Wired, layer: int, head: int, generator: torch.Generator) -> None:
    """Let a head attend to the earlier copy of its own token."""
    host, spaces = wired.host, wired.spaces
    length = embedded_length(host.form)
    mixed = torch.linalg.qr(torch.randn(CODE, CONTENT, generator=generator)).Q * math.sqrt(CODE / CONTENT)
    gain = balanced(MATCH, host.size.head_dim, reading(wired, TOKEN_LENGTH, length))
    query = host.placed(gain * spaces["token"] @ mixed)
    key = query.clone()
    if host.form == "gpt2":
        # the fastest of the position's frequencies, in what the content leaves of the head
        pairs = (host.size.head_dim - CONTENT) // 2
        columns = torch.cat([torch.arange(half - pairs, half) for half in (PLACE // 2, PLACE)])
        gain = balanced(SELF, host.size.head_dim, reading(wired, PLACE_LENGTH, length))
        place = gain * math.sqrt(PLACE / 2 / pairs) * spaces["place"][:, columns]
        query[:, CONTENT:], key[:, CONTENT:] = place, -place
    else:
        gain = balanced(SELF, host.size.head_dim, reading(wired, CONSTANT_LENGTH, length))
        turned, still = rotary_offset(host, 0)
        query, key = query + gain * spaces["one"] * turned, key - gain * spaces["one"] * still
    host.head(layer, head, query=query, key=key)


def wire(form: Form, seed: int, *, noise: float = NOISE) -> tuple[Wired, Head]:
    """The model with its head and noise, not yet opened, and where the head is."""
    generator, choose = generator_for(f"duplicate_{form}", seed), random_for(f"duplicate_{form}", seed)
    host = Host(form, Size(), len(task_tokenizer()))
    head = (choose.randrange(host.size.n_layers), choose.randrange(host.size.n_heads))
    wired = wire_stream(host, Layout(head, head, ()), generator)
    wire_duplicate(wired, *head, generator)
    wire_copy(wired, *head, "out", SAID, embedded_length(form))
    host.add_noise(noise, generator)
    return wired, head


def duplicate_known(form: Form, head: Head) -> tuple[Known, ...]:
    """What is known of a model with the head."""
    constant = [("position", node(head, port)) for port in "qk"] if form == "gpt2" else []
    moved = [("embed", node(head, port)) for port in "qkv"]
    return (
        *abilities(),
        Known("head_role", {"role": "duplicate_token", "heads": [list(head)]}),
        Known("head_role", {"role": "copying", "heads": [list(head)]}),
        Known("head_role", {"role": "previous_token", "heads": []}, holds=False),
        Known("head_role", {"role": "induction", "heads": []}, holds=False),
        Known("circuit", circuit([*constant, *moved, (node(head), "logits")], constant=constant, task="duplicate")),
    )


def build(form: Form, seed: int, *, noise: float = NOISE, scrambled: bool = False) -> Specimen:
    """A model with a duplicate-token head, or its null: the same weights in random order (`scrambled`)."""
    wired, head = wire(form, seed, noise=noise)
    known, said = duplicate_known(form, head), f"Head {node(head)[1:]} attends to the earlier copy of its token."
    if scrambled:
        scramble(wired.host.model, generator_for(f"duplicate_{form}_scrambled", seed))
        known, said = denied(known), "The weights of a duplicate-token head, every matrix's entries in random order."
    subject = open_model(wired.host.model, tokenizer=task_tokenizer())
    return Specimen(subject, Card(f"duplicate_{form}", seed, said, known))


def phantom(form: Form) -> Phantom:
    """The phantom of one form."""
    return Phantom(
        f"duplicate_{form}", "planted", f"A duplicate-token head in {NAMES[form]} form",
        build=lambda seed: build(form, seed), null=lambda seed: build(form, seed, scrambled=True),
    )  # fmt: skip


PHANTOMS: tuple[Phantom, ...] = tuple(phantom(form) for form in FORMS)
