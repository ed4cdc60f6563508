"""Phantoms with an induction circuit: a list of random words goes on as it did before, by two known heads.

Which layers and heads they are, the codes of the tokens, the distractors and the noise vary with the seed. The wiring
and how it can mislead are told in `circuit`. The noise, 0.02, is as large as all of GPT-2's initial weights.

Two nulls: the same weights in random order (`induction_*`), and the same weights with the previous-token head's output
taken away, which still attends to the token before and moves nothing (`induction_severed_*`): a score of attention
can't tell that twin from the whole one by that head, a causal test can.

On the card: which edges a patch between prompts can show depends on the corruption (`differs`); an edge that carries
the same in both prompts can be shown by ablation only.
"""

from __future__ import annotations

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen
from tomoscope.phantoms.planted.cards import Edge, abilities, circuit, denied, node, scramble, z_site
from tomoscope.phantoms.planted.circuit import Layout, Wired, draw_layout, wire_induction
from tomoscope.phantoms.planted.host import Form, Host, Size
from tomoscope.phantoms.planted.spaces import generator_for, random_for
from tomoscope.phantoms.planted.words import task_tokenizer

NOISE = 0.02
FORMS: tuple[Form, ...] = ("gpt2", "llama")
SAID: dict[Form, str] = {"gpt2": "GPT-2", "llama": "Llama"}


def induction_circuit(form: Form, layout: Layout) -> dict:
    """The circuit's statement: every wired edge, and which of them differ under the task's corruptions."""
    first, second = layout.previous, layout.induction
    place = "position" if form == "gpt2" else "embed"  # rotary positions stand in no node: the constant is turned
    constant: list[Edge] = [(place, node(first, "q")), (place, node(first, "k"))]
    faint: list[Edge] = [("embed", node(second, "k"))]
    moved, matched = ("embed", node(first, "v")), (node(first), node(second, "k"))
    asked, copied, said = ("embed", node(second, "q")), ("embed", node(second, "v")), (node(second), "logits")
    differs = {"flip": [list(copied), list(said)], "no_repeat": [list(e) for e in (moved, matched, copied, said)]}
    edges = [*constant, moved, matched, asked, *faint, copied, said]
    return circuit(edges, constant=constant, faint=faint, task="induction", differs=differs)


def induction_known(form: Form, layout: Layout) -> tuple[Known, ...]:
    """All that is known of a model with the circuit."""
    first, second = layout.previous, layout.induction
    return (
        *abilities("induction"),
        Known("head_role", {"role": "previous_token", "heads": [list(first)]}),
        Known("head_role", {"role": "induction", "heads": [list(second)]}),
        Known("head_role", {"role": "copying", "heads": [list(second)]}),
        Known("head_role", {"role": "duplicate_token", "heads": []}, holds=False),
        Known("site", {"task": "induction", "sites": [z_site(second)]}),
        Known("needed", {"task": "induction", "sites": [z_site(first), z_site(second)]}),
        Known("circuit", induction_circuit(form, layout)),
    )


def wire(form: Form, seed: int, *, noise: float = NOISE) -> Wired:
    """The model with the circuit and its noise, not yet opened."""
    generator = generator_for(f"induction_{form}", seed)
    choose = random_for(f"induction_{form}", seed)
    host = Host(form, Size(), len(task_tokenizer()))
    wired = wire_induction(host, draw_layout(host, choose), generator)
    wired.host.add_noise(noise, generator)
    return wired


def build(form: Form, seed: int, *, noise: float = NOISE) -> Specimen:
    """A model that does induction.

    Args:
        form: "gpt2" or "llama".
        seed: of layers, heads, codes, distractors and noise.
        noise: standard deviation of the noise on every weight.
    """
    wired = wire(form, seed, noise=noise)
    subject = open_model(wired.host.model, tokenizer=task_tokenizer())
    said = (
        f"Head {node(wired.layout.previous)[1:]} looks to the token before, head {node(wired.layout.induction)[1:]} to "
        f"what followed the same token, by its keys; noise {noise:g} on every weight."
    )
    return Specimen(subject, Card(f"induction_{form}", seed, said, induction_known(form, wired.layout)))


def build_scrambled(form: Form, seed: int) -> Specimen:
    """The same weights in random order."""
    wired = wire(form, seed)
    model = scramble(wired.host.model, generator_for(f"induction_{form}_scrambled", seed))
    card = Card(
        f"induction_{form}", seed, "The weights of an induction circuit, every matrix's entries in random order.",
        denied(induction_known(form, wired.layout)),
    )  # fmt: skip
    return Specimen(open_model(model, tokenizer=task_tokenizer()), card)


def build_severed(form: Form, seed: int) -> Specimen:
    """The same weights, but the previous-token head writes nothing."""
    wired = wire(form, seed)
    head_dim, width = wired.host.size.head_dim, wired.host.size.d_model
    wired.host.head(*wired.layout.previous, output=wired.codes.new_zeros(head_dim, width))
    stays = ("previous_token", "copying")  # it still attends to the token before; the later head still would copy
    known = tuple(
        one if one.value.get("role") in stays else denied((one,))[0] for one in induction_known(form, wired.layout)
    )
    said = f"Head {node(wired.layout.previous)[1:]} still looks to the token before, and writes nothing: no induction."
    card = Card(f"induction_severed_{form}", seed, said, known)
    return Specimen(open_model(wired.host.model, tokenizer=task_tokenizer()), card)


def phantoms(form: Form) -> tuple[Phantom, Phantom]:
    """The two phantoms of one form: against scrambled weights, and against the severed twin."""
    return (
        Phantom(
            f"induction_{form}", "planted", f"An induction circuit in {SAID[form]} form",
            build=lambda seed: build(form, seed), null=lambda seed: build_scrambled(form, seed),
        ),
        Phantom(
            f"induction_severed_{form}", "planted", f"Induction beside a severed twin, {SAID[form]} form",
            build=lambda seed: _renamed(build(form, seed), f"induction_severed_{form}"),
            null=lambda seed: build_severed(form, seed),
        ),
    )  # fmt: skip


def _renamed(specimen: Specimen, name: str) -> Specimen:
    card = specimen.card
    return Specimen(specimen.subject, Card(name, card.seed, card.description, card.known), specimen.data)


PHANTOMS: tuple[Phantom, ...] = tuple(one for form in FORMS for one in phantoms(form))
