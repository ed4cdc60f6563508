"""A feature circuit of two hops, with its dictionary, so that the true attribution graph is known edge by edge.

A neuron knows a country by its name, a head carries it to the end, another neuron there says its capital; the
dictionary's features are these neurons.

The stream is token + constant, and four parts that begin empty: what country was named (written by the early MLP where
the name stands), a flag beside it, the same country carried (by a head that looks for the flag), and what to say.

    token ' France'  ->  early feature k at the name  ->  late feature k at the end  ->  logit ' Paris'

Further features of the early layer fire at common words and write where nobody reads: active, and idle.

Source of the idea: the "capital of the state containing Dallas" graph of Lindsey et al. 2025, "On the Biology of a
Large Language Model". On the card: the ability (facts), the feature circuit, and that the early neuron, the head and
the late neuron are each needed. Null: the same weights, but the early neurons write the flag alone, so that the head
carries nothing and the late neurons stay silent.

How it can mislead: one neuron a country in each of two layers, nothing in superposition, and what a gate or a GELU does
beside a ReLU is the only error: a method that fails here fails, and one that passes has passed the easiest case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tomoscope.data.tasks.words import CAPITALS
from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import abilities, denied, node
from tomoscope.phantoms.planted.circuit import CODE, CONSTANT_LENGTH, LOGIT, SAID, TOKEN_LENGTH, VALUE, WRITTEN
from tomoscope.phantoms.planted.host import Form, Host, Size, balanced
from tomoscope.phantoms.planted.induction import FORMS
from tomoscope.phantoms.planted.induction import SAID as NAMES
from tomoscope.phantoms.planted.spaces import Spaces, generator_for, random_for, subspaces, unit_codes
from tomoscope.phantoms.planted.words import task_tokenizer

NOISE = 0.005
FIRES, THRESHOLD, FLAG, SCORE = 8.0, 0.7, 8.0, 40.0
"""Pre-activation of a neuron that fires, the cosine at which it begins to, the flag's length, the head's score."""
IDLE, IDLE_LENGTH = (" capital", " city", " of", " is", " the", "The"), 0.5
"""Words at which further neurons of the early layer fire, and the length of what they write, which nobody reads."""


@dataclass(frozen=True)
class Hops:
    """Where the parts are: layers of the early and late neurons, the head, and the neuron of each country."""

    early: int
    head: tuple[int, int]
    late: int
    neurons: tuple[int, ...]
    idle: tuple[int, ...]


def draw(host: Host, name: str, seed: int) -> Hops:
    """The layout of one specimen."""
    choose, size = random_for(name, seed), host.size
    early, middle, late = sorted(choose.sample(range(size.n_layers), 3))
    head = (middle, choose.randrange(size.n_heads))
    neurons = choose.sample(range(size.d_mlp), len(CAPITALS) + len(IDLE))
    return Hops(early, head, late, tuple(neurons[: len(CAPITALS)]), tuple(neurons[len(CAPITALS) :]))


def wire(form: Form, seed: int, *, severed: bool = False) -> tuple[Host, Hops, tuple[dict[str, Tensor], ...]]:
    """The model, its layout, and the dictionary of each layer as W_enc, W_dec, b_enc, b_dec."""
    tokenizer, name = task_tokenizer(), f"hops_{form}"
    generator = generator_for(name, seed)
    host = Host(form, Size(), len(tokenizer))
    hops, width = draw(host, name, seed), host.size.d_model
    host.add_noise(NOISE, generator)
    widths = {"token": CODE, "named": CODE, "carried": CODE, "out": CODE, "one": 1, "flag": 1, "idle": 8}
    spaces = subspaces(width, widths, generator)
    codes = unit_codes(len(tokenizer), CODE, generator)
    host.embedding.copy_(TOKEN_LENGTH * codes @ spaces["token"].T + CONSTANT_LENGTH * spaces["one"].T)
    host.unembedding.copy_(LOGIT / math.sqrt(width) * codes @ spaces["out"].T)
    ids = [[tokenizer(f" {word}")["input_ids"][0] for word in pair] for pair in CAPITALS]
    countries, capitals = (codes[torch.tensor([pair[i] for pair in ids])] for i in range(2))
    start = math.hypot(TOKEN_LENGTH, CONSTANT_LENGTH)
    later = math.hypot(start, WRITTEN)
    write_named = torch.zeros_like(countries) if severed else countries
    common = codes[torch.tensor([tokenizer(word)["input_ids"][0] for word in IDLE])]
    lost = IDLE_LENGTH * unit_codes(len(IDLE), 8, generator) @ spaces["idle"].T
    token, carried = ("token", TOKEN_LENGTH, start), ("carried", WRITTEN, later)
    named = WRITTEN * write_named @ spaces["named"].T + FLAG * spaces["flag"].T
    early = _neurons(host, hops.early, (*hops.neurons, *hops.idle), spaces, token, torch.cat([countries, common]),
                     torch.cat([named, lost]))  # fmt: skip
    late = _neurons(host, hops.late, hops.neurons, spaces, carried, countries, SAID * capitals @ spaces["out"].T)
    _carry(host, hops, spaces, start)
    silent = {"W_enc": torch.zeros(width, len(CAPITALS)), "W_dec": torch.zeros(len(CAPITALS), width),
              "b_enc": torch.full((len(CAPITALS),), -1.0), "b_dec": torch.zeros(width)}  # fmt: skip
    parts = {hops.early: early, hops.late: late}
    return host, hops, tuple(parts.get(layer, silent) for layer in range(host.size.n_layers))


def _neurons(
    host: Host,
    layer: int,
    places: tuple[int, ...],
    spaces: Spaces,
    reads: tuple[str, float, float],
    codes: Tensor,
    writes: Tensor,
) -> dict[str, Tensor]:
    """Wire neurons, each of which fires at a code in a part of the stream; returns them as a dictionary.

    Args:
        host, layer, places, spaces: where.
        reads: the part, its length in the stream, and the stream's length.
        codes: [neuron, CODE] what each fires at.
        writes: [neuron, d_model] what each adds to the stream when it fires.
    """
    part, length, whole = reads
    scale = math.sqrt(host.size.d_model) / whole  # from the stream to the normed stream
    gain = FIRES / (1 - THRESHOLD) / (scale * length)
    one = spaces["one"][:, 0]
    encoder, decoder = [], []
    for index, code, write in zip(places, codes, writes, strict=True):
        read = gain * (spaces[part] @ code - THRESHOLD * length / CONSTANT_LENGTH * one)
        gate = one / (scale * CONSTANT_LENGTH)  # a gate of about 1, from the constant
        added = write / host.activation(FIRES)
        host.neuron(layer, index, read=read, write=added, gate=gate)
        encoder.append(read)
        decoder.append(added)
    none = torch.zeros(len(codes))
    return {"W_enc": torch.stack(encoder, 1), "W_dec": torch.stack(decoder), "b_enc": none,
            "b_dec": torch.zeros(host.size.d_model)}  # fmt: skip


def _carry(host: Host, hops: Hops, spaces: Spaces, start: float) -> None:
    """Let a head look for the flag and carry what was named to where it stands."""
    named = math.sqrt(start**2 + WRITTEN**2 + FLAG**2)
    scale = math.sqrt(host.size.d_model)
    query = balanced(SCORE, host.size.head_dim, scale * CONSTANT_LENGTH / start) * spaces["one"]
    key = balanced(SCORE, host.size.head_dim, scale * FLAG / named) * spaces["flag"]
    # one dimension of content, put where rotation hardly turns it
    pad = torch.zeros(len(query), 1)
    value = VALUE / (scale * WRITTEN / named) * spaces["named"]
    host.head(
        *hops.head, query=host.placed(torch.cat([query, pad], 1)), key=host.placed(torch.cat([key, pad], 1)),
        value=value, output=WRITTEN / VALUE * spaces["carried"].T,
    )  # fmt: skip


def hops_known(hops: Hops) -> tuple[Known, ...]:
    """All that is known of a model with the circuit."""
    early, late = f"layer.{hops.early}.mlp.out", f"layer.{hops.late}.mlp.out"
    head = f"layer.{hops.head[0]}.attn.z[head={hops.head[1]}]"
    value = {
        "task": "facts", "early": hops.early, "late": hops.late, "head": node(hops.head), "at": ["subject", "end"],
        "features": [[country, capital, index] for index, (country, capital) in enumerate(CAPITALS)],
        "path": ["token at the subject", "early feature at the subject", "late feature at the end", "logit"],
    }  # fmt: skip
    return (
        *abilities("facts"),
        Known("needed", {"task": "facts", "sites": [early, head, late]}),
        Known("feature_circuit", value),
    )


def build(form: Form, seed: int, *, severed: bool = False) -> Specimen:
    """A model that recalls capitals in two hops; `severed`: the early neurons do not say which country.

    Returns:
        A specimen whose data has "transcoders": for each layer W_enc [d_model, feature], W_dec [feature, d_model],
        b_enc and b_dec; a feature is a country, in the order of `CAPITALS`, in the early layer then a word of `IDLE`.
    """
    host, hops, dictionary = wire(form, seed, severed=severed)
    subject = open_model(host.model, tokenizer=task_tokenizer())
    known = hops_known(hops)
    said = f"Neurons of layer {hops.early} know countries, head {node(hops.head)[1:]} carries them to the end, neurons "
    said += f"of layer {hops.late} say their capitals."
    if severed:
        known, said = denied(known), "Neurons flag a country without saying which, so no capital follows."
    return Specimen(subject, Card(f"hops_{form}", seed, said, known), {"transcoders": dictionary})


def phantom(form: Form) -> Phantom:
    """The phantom of one form."""
    return Phantom(
        f"hops_{form}", "planted", f"A feature circuit of two hops, {NAMES[form]} form",
        build=lambda seed: build(form, seed), null=lambda seed: build(form, seed, severed=True),
    )  # fmt: skip


PHANTOMS: tuple[Phantom, ...] = tuple(phantom(form) for form in FORMS)
