"""The two-hop phantom does what its card says, and its attribution graph is the planted one, edge by edge."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tomoscope.circuits.attribution import (
    AttributionGraph,
    Intervention,
    LocalReplacement,
    attribution_graph,
    check_interventions,
    intervene,
    prune,
    qk_attribution,
    scores,
    suppress,
)
from tomoscope.data.tasks import facts
from tomoscope.data.tasks.words import CAPITALS
from tomoscope.features import SparseCoder, TranscoderSet
from tomoscope.model import zero
from tomoscope.phantoms.phantom import Card, Specimen
from tomoscope.phantoms.planted import hops

FORMS = ("gpt2", "llama")
PROMPT, SUBJECT, END = "The capital of France is", 3, 4


@cache
def specimen(form: str, seed: int = 0, *, null: bool = False) -> Specimen:
    phantom = next(one for one in hops.PHANTOMS if one.name == f"hops_{form}")
    return (phantom.null if null else phantom.build)(seed)


def replaced(one: Specimen, prompt: str = PROMPT) -> LocalReplacement:
    dictionary = TranscoderSet([SparseCoder(**parts) for parts in one.data["transcoders"]])
    return LocalReplacement.of(one.subject, dictionary, prompt)


def graph_of(one: Specimen, prompt: str = PROMPT, targets: tuple[str, ...] = (" Paris", " Berlin")) -> AttributionGraph:
    replacement = replaced(one, prompt)
    return attribution_graph(one.subject, replacement.transcoders, prompt, targets=targets, replacement=replacement)


def circuit(one: Specimen) -> dict:
    return dict(next(one.card.of("feature_circuit")).value)


@pytest.mark.parametrize("form", FORMS)
def test_contract(form: str) -> None:
    whole, null = specimen(form), specimen(form, null=True)
    for one in (whole, null):
        assert Card.from_json(one.card.to_json()) == one.card
        assert one.subject.facts.parity == 0.0
    assert {(k.kind, str(k.value)) for k in whole.card.known} == {(k.kind, str(k.value)) for k in null.card.known}
    assert whole.subject.facts.n_parameters == null.subject.facts.n_parameters
    assert not any(known.holds for known in null.card.of("feature_circuit"))


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("form", FORMS)
def test_it_knows_capitals_and_needs_each_part(form: str, seed: int) -> None:
    one = specimen(form, seed)
    pairs = facts.make(one.subject.tokenizer, 60, seed=seed).pairs
    prompts = [pair.clean.text for pair in pairs]
    answers = torch.tensor([one.subject.tokenizer(pair.answers[0])["input_ids"][0] for pair in pairs])

    def share(edits: list, subject: object = one.subject) -> float:
        return float((subject.last_logits(prompts, edits=edits).argmax(-1) == answers).double().mean())

    assert share([]) > 0.95
    for site in next(one.card.of("needed")).value["sites"]:
        assert share([zero(site)]) < 0.2, site
    assert share([], specimen(form, seed, null=True).subject) < 0.1


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_the_planted_path(form: str, seed: int) -> None:
    one = specimen(form, seed)
    known, graph = circuit(one), graph_of(one)
    france = next(i for i, (country, _) in enumerate(CAPITALS) if country == "France")
    early, late = graph.number_of(known["early"], SUBJECT, france), graph.number_of(known["late"], END, france)
    token, logit = graph.range_of("token").start + SUBJECT, graph.range_of("logit").start
    for target, source in ((early, token), (late, early), (logit, late)):
        assert graph.inputs(target, 1)[0][0].number == source
        assert graph.weight(source, target) > 0.7 * float(graph.values[graph.row_of(target)])
    # no shortcut: the logit gets nothing else that would matter
    assert abs(graph.weight(late, logit)) > 20 * max(abs(w) for n, w in graph.inputs(logit, 5) if n.number != late)
    pruned = prune(graph)
    assert bool(pruned.nodes[[early, late, token, logit]].all())
    # all features that fire are the country's, and those of common words, which do nothing
    assert {f for _, _, f in graph.features.tolist() if f < len(CAPITALS)} == {france}
    idle = [n for n in range(graph.n_features) if int(graph.features[n, 2]) >= len(CAPITALS)]
    assert len(idle) == 3  # the first position has none
    influence = pruned.influence
    assert float(influence[idle].max()) < 0.02 * float(influence[[early, late]].min())
    assert scores(graph).completeness > 0.95
    null = graph_of(specimen(form, seed, null=True))
    assert (null.features[:, 0] != known["late"]).all()


@pytest.mark.parametrize("form", FORMS)
def test_features_that_are_set_change_what_is_said(form: str) -> None:
    one = specimen(form)
    known, graph, replacement = circuit(one), graph_of(one), replaced(one)
    names = [country for country, _ in CAPITALS]
    france, germany = names.index("France"), names.index("Germany")
    early = graph.number_of(known["early"], SUBJECT, france)
    swap = [
        Intervention(known["early"], SUBJECT, france, 0.0),
        Intervention(known["early"], SUBJECT, germany, float(graph.activations[early])),
    ]
    for mode in ("iterative", "free"):
        said = intervene(replacement, swap, mode=mode).last.argmax(-1)
        assert one.subject.tokenizer.decode(said.tolist()) == " Berlin"
    # the graph foretells what taking the early feature away does to the answer, through the feature in between
    gone = check_interventions(graph, replacement, [suppress(graph, [early])], mode="iterative")
    assert float(gone.actual[0, graph.n_features]) < -8
    assert float(gone.predicted[0, graph.n_features]) < -8


@pytest.mark.parametrize("form", FORMS)
def test_the_head_attends_for_what_the_early_feature_writes(form: str) -> None:
    one = specimen(form)
    known, replacement = circuit(one), replaced(one)
    layer, head = (int(part) for part in known["head"][1:].split(".h"))
    found = qk_attribution(replacement, layer=layer, head=head, query=END, key=SUBJECT, against=1)
    asked, told, part = found.pairs(1)[0]
    assert told.startswith(f"L{known['early']} p{SUBJECT} f")
    assert asked == "token ' is' p4"
    assert part > 0.8 * found.score > 0
