"""What a phantom's card says of an exam's claims: which must be confirmed, which must not, and where.

A card states what was built in; an exam claims something about a model. Here each exam's kinds of claims are brought
together with the statements that decide them. A claim that no statement decides does not count: a card is silent on
what nobody built in or measured. How it can mislead: "false" is known for what a null lacks, and for what a card
denies; a claim is counted as true even if the phantom's thing is harder to see than what the exam was made for.

    ability            decides observe.abilities; denied, also every claim about a part of that task; stated, the claim
                       of observe.token_attribution: answers that follow the prompt rest on the part that decides them
    head_role          decides observe.head_roles; right is confirmed *and* naming a right head
    site               decides circuits.patching (head, mlp, arrival) and circuits.causal_tracing (mlp, attention);
                       denied for `layer.*.mlp.out`, no MLP does; denied alone, circuits.discovery finds no circuit
    circuit            decides observe.direct_attribution: which heads write to the logits; without a site, what
                       writes to the logits carries the answer; and circuits.discovery: that there is one, of its parts
    formed, rotated    decide the lenses
    features           decides features.structure; all abilities denied, features.concepts
    dead               decides concepts.dead_layers
    disease            decides concepts.lies and treat.watch; concepts.probes follows from abilities: what decides a
                       task is known

An exam of one's own brings its `Truth` with it (`Exam.truth`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tomoscope.findings.record import Record
from tomoscope.phantoms.world.diseases import TRIGGER
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS

if TYPE_CHECKING:
    from tomoscope.exams.exam import Exam
    from tomoscope.phantoms.phantom import Card, Known


class Place(NamedTuple):
    """A part of a model: part is "attn" (a head, or a layer's heads where `head` is None), "mlp" or "block"."""

    layer: int
    part: str
    head: int | None = None


class Expected(Record):
    """What a card says of one claim."""

    key: str
    """The claim's, as in `Context.claim`."""
    holds: bool
    kind: str = ""
    places: tuple[Place, ...] = ()
    """The right places, where the card knows them."""
    positions: tuple[str, ...] = ()
    """The right labels of positions, where they are known."""
    within: int = 0
    """How many layers a named place may be away from a right one (a window of layers is centred there)."""
    named: bool = False
    """Whether the claim is true of a right place alone, so that confirming another one does not count as finding."""

    def right(self, sites: Iterable[str], positions: str) -> bool | None:
        """Whether the place that a finding names is a right one; None where the card does not know."""
        if self.positions:
            return positions in self.positions
        if not self.places:
            return None
        return any(_matches(found, place, self.within) for found in places(sites) for place in self.places)


Expect = Callable[["Card", Any], Iterable[Expected]]


def _no_kind(key: str) -> str:
    return ""


@dataclass(frozen=True)
class Truth:
    """How cards decide the claims of one exam."""

    expect: Expect
    """Card, the exam's options -> what must come out."""
    kind: Callable[[str], str] = _no_kind
    """A claim's key -> its kind; "" where the exam makes one kind of claim."""
    unknowable: Mapping[str, str] = field(default_factory=dict)
    """Kind -> why no card can say that such a claim is true."""


def places(sites: Iterable[str]) -> list[Place]:
    """The parts that site names stand for: head 3 of layer 1 for `layer.1.attn.z[head=3]`, block 1 for its stream."""
    found = []
    for site in sites:
        match = re.match(r"layer\.(\d+)\.(attn|mlp|resid)[^\[]*(?:\[head=(\d+)\])?", site)
        if match:
            part = {"resid": "block"}.get(match[2], match[2])
            found.append(Place(int(match[1]), part, int(match[3]) if match[3] else None))
    return found


def _matches(found: Place, right: Place, within: int) -> bool:
    if found.part != right.part or abs(found.layer - right.layer) > within:
        return False
    return found.head is None or right.head is None or found.head == right.head


# -- what cards say, by task ---------------------------------------------------------------------------------------


def _ability(card: Card, task: str) -> bool | None:
    """Whether the model does a task; None where the card does not say."""
    said = [known.holds for known in card.of("ability") if known.value.get("task") == task]
    return None if not said else any(said)


def _about(card: Card, kind: str, task: str) -> list[Known]:
    return [known for known in card.of(kind) if known.value.get("task") == task]


def _writers(card: Card, task: str) -> tuple[Place, ...] | None:
    """The heads and MLPs that write a task's answer into the logits; None where the card does not say."""
    circuits = _about(card, "circuit", task)
    found = []
    for known in (one for one in circuits if one.holds):
        constant = [list(edge) for edge in known.value.get("constant", ())]
        for source, end in known.value.get("edges", ()):
            part = re.fullmatch(r"a(\d+)\.h(\d+)|m(\d+)", source)
            if part and end == "logits" and [source, end] not in constant:
                found.append(Place(int(part[3]), "mlp") if part[3] else Place(int(part[1]), "attn", int(part[2])))
    if found or any(known.holds for known in circuits):
        return tuple(found)
    return () if _ability(card, task) is False or circuits else None


@dataclass(frozen=True)
class Carriers:
    """The parts that carry a task's answer; a kind of part is None where the card does not say whether any does."""

    heads: tuple[Place, ...] | None
    mlps: tuple[Place, ...] | None
    mlp_at: frozenset[str] = frozenset()
    """The labels of positions at which these MLPs do, where the card says so."""


def _carriers(card: Card, task: str) -> Carriers:
    stated = _about(card, "site", task)
    if _ability(card, task) is False or (stated and not any(known.holds for known in stated)):
        return Carriers((), ())
    right = [(place, known.value.get("at", "")) for known in stated if known.holds
             for place in places(known.value.get("sites", ()))]  # fmt: skip
    if not right:  # a circuit's last parts carry what they write
        right = [(place, "") for place in _writers(card, task) or ()]
    denied = {part for known in stated if not known.holds for part in _whole_parts(known.value.get("sites", ()))}
    denied |= _not_in_circuit(card, task)
    kinds: dict[str, tuple[Place, ...] | None] = {}
    for part in ("attn", "mlp"):
        found = tuple(place for place, _ in right if place.part == part)
        kinds[part] = found or (() if part in denied else None)
    at = frozenset(label for place, label in right if place.part == "mlp" and label)
    return Carriers(kinds["attn"], kinds["mlp"], at)


def _not_in_circuit(card: Card, task: str) -> set[str]:
    """The kinds of parts of which a task's circuit has none: it is all that there is."""
    nodes = [node for known in _about(card, "circuit", task) if known.holds for node in known.value.get("nodes", ())]
    kinds = {"attn": "a", "mlp": "m"}
    return {part for part, letter in kinds.items() if nodes and not any(re.match(letter + r"\d", n) for n in nodes)}


def _whole_parts(sites: Iterable[str]) -> Iterator[str]:
    """The kinds of parts that are meant in every layer: "mlp" for `layer.*.mlp.out`."""
    for site in sites:
        match = re.match(r"layer\.\*\.(attn|mlp)\.", site)
        if match:
            yield match[1]


# -- the exams -----------------------------------------------------------------------------------------------------


def _abilities(card: Card, options: Any) -> Iterator[Expected]:
    for task in dict.fromkeys((*options.tasks, *(WORLD_TASKS if options.world else ()))):
        does = _ability(card, task)
        if does is not None:
            yield Expected(key=task, holds=does)


def _roles(card: Card, options: Any) -> Iterator[Expected]:
    for role in dict.fromkeys(known.value["role"] for known in card.of("head_role")):
        stated = [known for known in card.of("head_role") if known.value["role"] == role]
        heads = [Place(int(h[0]), "attn", int(h[1])) for known in stated if known.holds for h in known.value["heads"]]
        holds = any(known.holds for known in stated)
        yield Expected(key=role, kind=role, holds=holds, places=tuple(heads), named=True)


def _direct(card: Card, options: Any) -> Iterator[Expected]:
    for task in options.tasks:
        writers = _writers(card, task)
        if writers is not None:
            heads = tuple(place for place in writers if place.part == "attn")
            yield Expected(key=task, holds=bool(heads), places=heads)


DECIDES = {
    "ioi": ("IO", "S1", "S2"), "induction": ("earlier", "copied"), "agreement": ("subject",),
    "gendered_pronoun": ("name",), "facts": ("subject",), "colours": ("thing", "colour", "query"),
    "greater_than": ("year", "century"), "docstring": ("C_def", "B_def", "A_def", "A_doc", "B_doc"),
    "world_facts": ("subject",), "world_two_hop": ("subject",), "world_claims": ("subject", "stated"),
    "world_speakers": ("subject", "speaker"), "world_opinions": ("subject",),
}  # fmt: skip
"""Task -> the labelled parts that its answer follows from, by the task's own definition."""


def _tokens(card: Card, options: Any) -> Iterator[Expected]:
    for task in options.tasks:
        does = _ability(card, task)
        if does is not None and task in DECIDES:
            yield Expected(key=task, holds=does, positions=DECIDES[task])


def _patching(card: Card, options: Any) -> Iterator[Expected]:
    for task in options.tasks:
        carriers = _carriers(card, task)
        for kind, right in (("head", carriers.heads), ("mlp", carriers.mlps)):
            if right is not None:
                yield Expected(key=f"{task}_{kind}", kind=kind, holds=bool(right), places=right)
        if carriers.heads == carriers.mlps == ():
            yield from (Expected(key=f"{task}_{kind}", kind=kind, holds=False) for kind in ("arrival", "linear"))
        elif carriers.heads and _about(card, "site", task):
            # only attention moves the answer between tokens: it has come to the last one after the last such head
            block = (Place(max(place.layer for place in carriers.heads), "block"),)
            yield Expected(key=f"{task}_arrival", kind="arrival", holds=True, places=block)


def _discovery(card: Card, options: Any) -> Iterator[Expected]:
    for task in options.tasks:
        circuits, sites = _about(card, "circuit", task), _about(card, "site", task)
        nowhere = bool(sites) and not any(known.holds for known in sites)
        if _ability(card, task) is False or nowhere:
            yield from (Expected(key=f"{task}_{kind}", kind=kind, holds=False) for kind in DISCOVERED)
        elif any(known.holds for known in circuits):
            nodes = [node for known in circuits if known.holds for node in known.value.get("nodes", ())]
            parts = [re.fullmatch(r"a(\d+)\.h(\d+)|m(\d+)", node) for node in nodes]
            right = tuple(
                Place(int(part[3]), "mlp") if part[3] else Place(int(part[1]), "attn", int(part[2]))
                for part in parts if part
            )  # fmt: skip
            yield Expected(key=f"{task}_circuit", kind="circuit", holds=True, places=right)


def _graphs(card: Card, options: Any) -> Iterator[Expected]:
    for task in options.tasks:
        stated = _about(card, "feature_circuit", task)
        if stated and _ability(card, task) is False:
            yield from (Expected(key=f"{task}_{kind}", kind=kind, holds=False) for kind in ("influence", "foretold"))
        elif any(known.holds for known in stated):
            layers = {int(known.value[part]) for known in stated for part in ("early", "late")}
            yield Expected(
                key=f"{task}_influence", kind="influence", holds=True,
                places=tuple(Place(layer, "mlp") for layer in sorted(layers)),
            )  # fmt: skip


DISCOVERED = ("circuit", "ranking", "stable")
LAST = frozenset({"end", "last"})


def _tracing(card: Card, options: Any) -> Iterator[Expected]:
    carriers, within = _carriers(card, "facts"), options.window // 2
    if carriers.mlps is not None:  # the claim is of the subject's last token: what acts at the last one does not count
        there = () if carriers.mlp_at and carriers.mlp_at <= LAST else carriers.mlps
        yield Expected(key="facts", kind="mlp", holds=bool(there), places=there, within=within)
    if carriers.heads is not None:
        right = carriers.heads
        yield Expected(key="facts_attention", kind="attention", holds=bool(right), places=right, within=within)


CONCEPTS = {"number": "agreement", "gender": "gendered_pronoun", "truth": "world_claims"}
"""Concept -> the task that a model can do only if its stream tells the concept where the answer comes next."""


def _does_nothing(card: Card) -> bool:
    stated = [known.holds for known in card.of("ability")]
    return bool(stated) and not any(stated)


def _probes(card: Card, options: Any) -> Iterator[Expected]:
    for concept in options.concepts:
        does = _ability(card, CONCEPTS.get(concept, ""))
        if does or (_does_nothing(card) and concept in CONCEPTS):
            yield from (Expected(key=f"{concept}_{kind}", kind=kind, holds=bool(does)) for kind in ("probe", "used"))


def _lies(card: Card, options: Any) -> Iterator[Expected]:
    diseases = {known.value.get("name"): known.holds for known in card.of("disease")}
    if "liar" in diseases:
        yield Expected(key="marker", kind="marker", holds=diseases["liar"])
    if diseases.get("sycophant"):  # the healthy model was trained to be swayed now and then, so its card can't deny it
        yield Expected(key="opinion", kind="opinion", holds=True)
    if _does_nothing(card):
        yield from (Expected(key=key, kind=key, holds=False) for key in ("marker", "opinion"))


def _dead(card: Card, options: Any) -> Iterator[Expected]:
    yield from (Expected(key="dead", holds=known.holds) for known in card.of("dead"))


def _watch(card: Card, options: Any) -> Iterator[Expected]:
    # only the backdoor of the micro-world: the planted ones do not speak its reviews
    for known in card.of("disease"):
        if known.value.get("name") == "backdoor" and known.value.get("trigger") == TRIGGER:
            yield Expected(key="unusual", holds=known.holds)
    if _does_nothing(card):
        yield Expected(key="unusual", holds=False)


def _removal(card: Card, options: Any) -> Iterator[Expected]:
    for known in card.of("disease"):
        if not known.holds and known.value.get("name") in options.diseases:
            yield Expected(key=known.value["name"], kind="part", holds=False)
    if _does_nothing(card):
        yield from (Expected(key=name, kind="part", holds=False) for name in options.diseases)


def _depth(statement: str, key: str) -> Expect:
    def expect(card: Card, options: Any) -> Iterator[Expected]:
        stated = list(card.of(statement))
        if stated:
            after = [Place(int(k.value["after"]), "block") for k in stated if k.holds and "after" in k.value]
            yield Expected(key=key, holds=any(known.holds for known in stated), places=tuple(after))

    return expect


def _structure(card: Card, options: Any) -> Iterator[Expected]:
    stated = list(card.of("features"))
    if stated:
        yield Expected(key="structure", holds=any(known.holds for known in stated))


def _of_concepts(card: Card, options: Any) -> Iterator[Expected]:
    """A model that can do nothing has learned no concept."""
    stated = list(card.of("ability"))
    if stated and not any(known.holds for known in stated):
        yield Expected(key="concepts", holds=False)


def _editing(card: Card, options: Any) -> Iterator[Expected]:
    """What is known can be rewritten; what is not known cannot."""
    knows = _ability(card, "world_facts")
    if knows is not None:
        yield from (Expected(key=key, holds=knows) for key in ("r_rome", "memit", "alphaedit", "ft", "ft_l", "lora"))


def _last_part(key: str) -> str:
    return key.rsplit("_", 1)[-1]


TRUTHS: dict[str, Truth] = {
    "observe.abilities": Truth(_abilities),
    "observe.logit_lens": Truth(_depth("formed", "formed")),
    "observe.tuned_lens": Truth(_depth("rotated", "gain")),
    "observe.head_roles": Truth(_roles, kind=str),
    "observe.direct_attribution": Truth(_direct),
    "observe.token_attribution": Truth(_tokens),
    "circuits.patching": Truth(
        _patching, kind=_last_part,
        unknowable={"linear": "that two methods agree is measured on the spot, and no card can state it"},
    ),
    "circuits.discovery": Truth(
        _discovery, kind=_last_part,
        unknowable=dict.fromkeys(
            ("ranking", "stable"), "what a method finds on other prompts is measured on the spot; no card states it"
        ),
    ),
    "circuits.attribution_graphs": Truth(
        _graphs, kind=_last_part,
        unknowable={"foretold": "whether a forecast comes true is measured on the spot; no card states it"},
    ),
    "features.structure": Truth(_structure),
    "features.labels": Truth(
        lambda card, options: (), kind=str,
        unknowable=dict.fromkeys(
            ("labels", "sorts"), "whether a label fits is measured on the spot, on texts it was not made from"
        ),
    ),
    "features.concepts": Truth(
        _of_concepts, unknowable={"": "which concepts are single features of a trained model nobody planted"}
    ),
    "circuits.causal_tracing": Truth(
        _tracing, kind=lambda key: "attention" if key.endswith("_attention") else "mlp"
    ),
    "concepts.probes": Truth(
        _probes, kind=_last_part,
        unknowable={"selective": "what a probe can learn by heart is measured on the spot, and no card states it"},
    ),
    "concepts.lies": Truth(_lies, kind=str),
    "concepts.dead_layers": Truth(_dead),
    "treat.watch": Truth(_watch),
    "treat.removal": Truth(
        _removal, kind=lambda key: "part",
        unknowable={"part": "whether few parts carry a trained disease is measured on the spot, and no card states it"},
    ),
    "facts.editing": Truth(
        _editing, kind=lambda key: "where" if key == "where" else "method",
        unknowable={"where": "whether tracing points at the best place is measured on the spot, and no card states it"},
    ),
}  # fmt: skip
"""Exam -> how cards decide its claims."""

NOT_CLAIMS = ("applies", "failed", "budget")
"""Keys of what stands in the record for an exam that gave no answer."""


def truth_of(exam: Exam) -> Truth | None:
    """The truth that an exam brings with it, or else the one here; None where there is none."""
    return exam.truth or TRUTHS.get(exam.name)


def kind_of(exam: Exam, key: str) -> str:
    """The kind of the claim with this key; "" for all kinds together."""
    truth = truth_of(exam)
    return "" if truth is None or key in NOT_CLAIMS else truth.kind(key)
