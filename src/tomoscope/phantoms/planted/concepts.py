"""Concepts along known directions: which are there, from which layer on, which are used, and how well a probe can do.

A statement ("Mary saw the red cup at the park. Say now") is answered " yes" or " no" at its last word. In the order of
the code:

1. embeddings: a code for each token, the word's list, its class (+1 or -1), a constant, and a ballast which makes
   every token's embedding equally long. The last words differ along a *salient* direction that means nothing.
2. attention of one layer moves four words' classes to every later position: name, place and colour, each along a
   direction of its own; and along the *blurred* one a second class of the colour plus a normal number of the thing.
3. the same layer's MLP computes *parity*, name and place of unequal classes: four neurons, one a corner. (In a later
   layer, the noise of the MLPs between would tell a little of it sooner: random features are features.)
4. the unembedding reads parity alone. So parity is used; colour and blurred are there and nothing reads them.
5. noise on every MLP, on the unembedding and on the attention of other layers, whose heads attend to themselves.

What follows at the last word: before the attention there is nothing at all of name, place and colour; parity is no
linear function of what is there before the MLP (the mean over either label is the same); the best probe for the blurred
class is right with probability Phi(d'/2), d' the distance of its means in standard deviations, however many statements
it is fitted on, because nothing else at that position tells the thing. That is why no other head may look elsewhere.

Null: the same weights whose heads for name, place and colour write nothing; salient and the blurring number stay.

How it can mislead: a threshold on name and place together is right on three of four corners, so that a probe fitted
without a held-out set may show up to 75 % for parity before its layer. Directions here are orthogonal and each
concept has one. Taking a large unused direction away (salient) makes the norm enlarge all the rest: logits grow, and
no answer changes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import denied
from tomoscope.phantoms.planted.host import Form, Host, Size, balanced, rotary_offset
from tomoscope.phantoms.planted.induction import FORMS, SAID
from tomoscope.phantoms.planted.spaces import Spaces, generator_for, place_codes, random_for, subspaces, unit_codes
from tomoscope.phantoms.planted.statements import (
    ANSWERS,
    LISTS,
    Classes,
    draw_classes,
    draw_statements,
    statement_tokenizer,
)

NOISE = 0.02
STATEMENTS = 512
TOKEN, CONSTANT, LIST, CLASS, NUMBER, SALIENT, LENGTH, POSITION = 8.0, 4.0, 8.0, 4.0, 2.0, 16.0, 20.0, 8.0
"""Lengths in the embedding: of the code, the constant, the list's mark, a class, a number of 1, the salient direction,
the whole, and the position (GPT-2 form)."""
WRITTEN, BLUR = 6.0, 6.0
"""Lengths along the concepts' directions, and of a number of 1 along the blurred one: d' = 2 x WRITTEN / BLUR."""
SCORE, SHARPNESS, THRESHOLD, LOGIT = 36.0, 20.0, 1.2, 40.0
MOVED = ("name", "place", "colour", "thing")
VALUES = ("name", "place", "colour", "blurred", "number")
CONCEPTS = ("name", "place", "colour", "blurred", "salient", "parity")
USED = ("name", "place", "parity")
SOURCE = {"name": "name", "place": "place", "colour": "colour", "blurred": "colour"}


def ideal_accuracy() -> float:
    """How often the best probe is right about the blurred class: Phi(d'/2)."""
    return NormalDist().cdf(WRITTEN / BLUR)


@dataclass(frozen=True)
class Plan:
    """Where a specimen's parts are.

    Attributes:
        at: the layer that moves and computes.
        heads: which of its heads moves which word.
        neurons: the four neurons of parity.
        classes: what the words stand for.
    """

    at: int
    heads: dict[str, int]
    neurons: tuple[int, ...]
    classes: Classes

    def layer(self, concept: str) -> int:
        """The first layer after which a concept can be read; -1 for the embedding."""
        return -1 if concept == "salient" else self.at

    def site(self, concept: str) -> str:
        """The first site at which a concept can be read at the last word."""
        return {"salient": site(-1), "parity": site(self.at)}.get(concept, f"layer.{self.at}.resid_mid")

    def before(self, concept: str) -> str:
        """The last site at which it can't."""
        return f"layer.{self.at}.resid_mid" if concept == "parity" else site(self.at - 1)


def site(layer: int) -> str:
    """The stream after a layer, the embedding for -1."""
    return "embed" if layer < 0 else f"layer.{layer}.resid_post"


def embed(host: Host, spaces: Spaces, classes: Classes, generator: torch.Generator) -> None:
    """Write the embeddings: all of one length, so that what the norm divides by is the same at every word."""
    vocabulary = statement_tokenizer().get_vocab()
    rows = TOKEN * unit_codes(len(vocabulary), spaces["token"].shape[1], generator) @ spaces["token"].T
    rows += CONSTANT * spaces["one"][:, 0]

    def put(word: str, vector: Tensor) -> None:
        for spelled in (word, f" {word}"):  # with its space, and at the start of a text
            if spelled in vocabulary:
                rows[vocabulary[spelled]] += vector

    for i, name in enumerate(MOVED):
        for word in LISTS[name]:
            put(word, LIST * spaces["list"][:, i])
    for i, name in enumerate(VALUES):
        given = classes.number if name == "number" else classes.of[name]
        for word, value in given.items():
            put(word, (NUMBER if name == "number" else CLASS) * value * spaces["value"][:, i])
    for word, side in classes.of["salient"].items():
        put(word, SALIENT * side * spaces["salient"][:, 0])
    rest = LENGTH**2 - rows.square().sum(1, keepdim=True)
    host.embedding.copy_(rows + rest.sqrt() * spaces["ballast"].T)
    if host.form == "gpt2":
        codes = place_codes(host.size.context, spaces["position"].shape[1])
        host.positions.copy_(POSITION * codes @ spaces["position"].T)


def stream_scale(host: Host, *written: float) -> float:
    """What the norm multiplies a stream by: the embedding, the position, and what was written since."""
    return math.sqrt(host.size.d_model) / math.hypot(LENGTH, POSITION if host.form == "gpt2" else 0.0, *written)


def move(host: Host, spaces: Spaces, plan: Plan, written: tuple[str, ...]) -> None:
    """Wire the heads that find the words of a list and write what those stand for."""
    scale, dims = stream_scale(host), host.size.head_dim
    gain = math.sqrt(SCORE * math.sqrt(dims))
    for name, head in plan.heads.items():
        wanted = torch.nn.functional.one_hot(torch.tensor(MOVED.index(name)), len(MOVED)).float()
        output = torch.zeros(len(VALUES), host.size.d_model)
        if name == "thing":
            output[VALUES.index("number")] = BLUR / (NUMBER * scale) * spaces["blurred"][:, 0]
        for concept, source in SOURCE.items():
            if source == name and concept in written:
                output[VALUES.index(concept)] = WRITTEN / (CLASS * scale) * spaces[concept][:, 0]
        # the same keys and values for every head: two heads of the Llama form share theirs
        host.head(
            plan.at, head, query=host.placed(gain / (CONSTANT * scale) * spaces["one"] * wanted),
            key=host.placed(gain / (LIST * scale) * spaces["list"]), value=spaces["value"], output=output,
        )  # fmt: skip


def compute(host: Host, spaces: Spaces, plan: Plan) -> None:
    """Wire parity: a neuron for each corner, which fires where both classes are that corner's."""
    # readings are told in units of the constant, whatever the norm divided by
    nominal = stream_scale(host, *[WRITTEN] * len(SOURCE), BLUR)
    one = spaces["one"][:, 0] / (CONSTANT * nominal)
    sides = [spaces[name][:, 0] / (WRITTEN * nominal) for name in ("name", "place")]
    corners = ((1, 1), (-1, -1), (1, -1), (-1, 1))
    for neuron, (first, second) in zip(plan.neurons, corners, strict=True):
        read = SHARPNESS * (first * sides[0] + second * sides[1] - THRESHOLD * one)
        fired = host.activation(SHARPNESS * (2 - THRESHOLD))
        write = (-1.0 if first == second else 1.0) * WRITTEN / fired * spaces["parity"][:, 0]
        host.neuron(plan.at, neuron, read=read, write=write, gate=one)


def rest(host: Host, spaces: Spaces, layer: int) -> None:
    """Let all heads of a layer attend to their own position."""
    for head in range(host.size.n_heads):
        if host.form == "gpt2":
            gain = balanced(4 * SCORE, host.size.head_dim, POSITION * stream_scale(host))
            query = key = gain * spaces["position"]
        else:
            gain = balanced(4 * SCORE, host.size.head_dim, CONSTANT * stream_scale(host))
            query, key = (gain * spaces["one"] * vector for vector in rotary_offset(host, 0))
        host.head(layer, head, query=query, key=key)


@dataclass(frozen=True)
class Wired:
    """A wired model, not yet opened, with its parts of the stream and the plan it follows."""

    host: Host
    spaces: Spaces
    plan: Plan


def draw_plan(size: Size, choose: random.Random) -> Plan:
    """Where one specimen's parts are."""
    at = choose.randrange(size.n_layers - 1)
    heads = dict(zip(MOVED, choose.sample(range(size.n_heads), len(MOVED)), strict=True))
    return Plan(at, heads, tuple(choose.sample(range(size.d_mlp), 4)), draw_classes(choose))


def wire(form: Form, seed: int, *, noise: float = NOISE, written: tuple[str, ...] = tuple(SOURCE)) -> Wired:
    """The model with its noise; `written` are the classes that attention moves."""
    generator, choose = generator_for(f"concepts_{form}", seed), random_for(f"concepts_{form}", seed)
    vocabulary = statement_tokenizer().get_vocab()
    host = Host(form, Size(), len(vocabulary))
    widths = {"token": 60, "one": 1, "ballast": 1, "list": len(MOVED), "value": len(VALUES)}
    widths |= dict.fromkeys(CONCEPTS, 1) | ({"position": 64} if form == "gpt2" else {})
    spaces = subspaces(host.size.d_model, widths, generator)
    plan = draw_plan(host.size, choose)
    embed(host, spaces, plan.classes, generator)
    others = [layer for layer in range(host.size.n_layers) if layer != plan.at]
    for layer in others:
        rest(host, spaces, layer)
    host.add_noise(noise, generator, only=("mlp", "lm_head", *(f".{layer}.{_attention(form)}" for layer in others)))
    move(host, spaces, plan, written)
    compute(host, spaces, plan)
    for answer, side in zip(ANSWERS, (-1, 1), strict=True):
        host.unembedding[vocabulary[answer]] += side * LOGIT / math.sqrt(host.size.d_model) * spaces["parity"][:, 0]
    return Wired(host, spaces, plan)


def _attention(form: Form) -> str:
    return "attn" if form == "gpt2" else "self_attn"


def concepts_known(plan: Plan) -> tuple[Known, ...]:
    """Each concept's direction: where it is, from where on, how well it can be read, whether it is used."""
    known = []
    for concept in CONCEPTS:
        layer = plan.layer(concept)
        value: dict[str, Any] = {
            "concept": concept, "at": "last", "from_layer": layer, "used": concept in USED,
            "accuracy": ideal_accuracy() if concept == "blurred" else 1.0,
        }  # fmt: skip
        known.append(Known("direction", {**value, "site": plan.site(concept)}))
        if layer >= 0:
            before: dict[str, Any] = {"concept": concept, "at": "last", "site": plan.before(concept), "accuracy": 0.5}
            if concept == "parity":
                before["at_most"] = 0.75  # three of four corners, which an unbalanced sample makes a probe choose
            known.append(Known("direction", before, holds=False))
    return tuple(known)


def build(form: Form, seed: int, *, noise: float = NOISE, written: tuple[str, ...] = tuple(SOURCE)) -> Specimen:
    """A model in whose stream concepts lie along known directions; `written` are the classes that attention moves.

    Returns:
        A specimen; its data has "statements" (text, label of parity), "labels" (concept -> labels of the same texts),
        "directions" (concept -> unit vector [d_model]), "answers" (of False and of True) and "classes".
    """
    wired = wire(form, seed, noise=noise, written=written)
    plan = wired.plan
    texts, labels = draw_statements(plan.classes, STATEMENTS, random_for("statements", seed))
    known = concepts_known(plan)
    if set(written) < set(SOURCE):
        known = tuple(one if one.value["concept"] == "salient" else denied((one,))[0] for one in known)
    said = (
        f"Layer {plan.at} moves the classes of four words to the last one, and its MLP computes parity, which alone is "
        f"answered. Written: {', '.join(written) or 'nothing'}."
    )
    data = {
        "statements": list(zip(texts, labels["parity"], strict=True)), "labels": labels, "answers": ANSWERS,
        "directions": {name: wired.spaces[name][:, 0].clone() for name in CONCEPTS}, "classes": plan.classes,
    }  # fmt: skip
    subject = open_model(wired.host.model, tokenizer=statement_tokenizer())
    return Specimen(subject, Card(f"concepts_{form}", seed, said, known), data)


def phantom(form: Form) -> Phantom:
    """The phantom of one form."""
    return Phantom(
        f"concepts_{form}", "planted", f"Concepts along known directions, {SAID[form]} form",
        build=lambda seed: build(form, seed), null=lambda seed: build(form, seed, written=()),
    )  # fmt: skip


PHANTOMS: tuple[Phantom, ...] = tuple(phantom(form) for form in FORMS)
