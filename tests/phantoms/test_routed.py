"""Taught by a known route: what may write is known by construction, checked by zeroing parts by hand."""

from __future__ import annotations

import pytest
import torch

from tomoscope.data import TASKS
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted.words import task_tokenizer
from tomoscope.phantoms.routed import TAUGHT, WAYS, draw_route, routed, taught


@pytest.fixture(scope="module", params=range(len(WAYS)), ids=list(WAYS))
def made(request):
    return draw_route(request.param), routed(request.param)


def share_right(model, task: str, *, seed: int = 5) -> float:
    """The right answer is the model's first, on prompts drawn afresh; one forward a prompt."""
    tokenizer, pairs = task_tokenizer(), TASKS[task].make(task_tokenizer(), 48, seed=seed)
    hits = 0
    for pair in pairs:
        with torch.no_grad():
            logits = model(**tokenizer(pair.clean.text, return_tensors="pt")).logits[0, -1]
        hits += int(logits.argmax()) == tokenizer(pair.answers[0])["input_ids"][0]
    return hits / len(pairs)


@pytest.mark.parametrize("task", list(TAUGHT))
def test_it_does_what_it_was_taught_and_through_the_route_alone(made, task):
    route, specimen = made
    model = specimen.subject.model
    assert share_right(model, task) > 0.95
    layer = model.model.layers[route.layer]
    head = slice(route.head * 32, (route.head + 1) * 32)
    kept = {}

    def without(weight, *where):
        kept[id(weight)] = (weight, weight.detach().clone())
        with torch.no_grad():
            weight[where] = 0.0

    def restore():
        with torch.no_grad():
            for weight, value in kept.values():
                weight.copy_(value)
        kept.clear()

    without(layer.self_attn.o_proj.weight, slice(None), head)
    assert share_right(model, task) < 0.7, "without the head"
    restore()
    if route.mlp is not None:
        without(model.model.layers[route.mlp].mlp.down_proj.weight, slice(None))
        assert share_right(model, task) < 0.7, "without the MLP"
        restore()
    for number, block in enumerate(model.model.layers):
        if number != route.mlp:
            without(block.mlp.down_proj.weight, slice(None))
        others = torch.ones(block.self_attn.o_proj.weight.shape[1], dtype=torch.bool)
        others[head] = number != route.layer
        without(block.self_attn.o_proj.weight, slice(None), others)
    assert share_right(model, task) > 0.95, "without everything else"
    restore()


def test_only_what_the_card_says_writes_where_it_is_read(made):
    _route, specimen = made
    model = specimen.subject.model
    read = model.lm_head.weight.abs().sum(0) > 0
    circuit = next(iter(specimen.card.of("circuit"))).value
    last = {source for source, end in circuit["edges"] if end == "logits"}
    writers = set()
    for number, block in enumerate(model.model.layers):
        if block.mlp.down_proj.weight[read].abs().sum() > 0:
            writers.add(f"m{number}")
        for head in range(4):
            if block.self_attn.o_proj.weight[read][:, head * 32 : (head + 1) * 32].abs().sum() > 0:
                writers.add(f"a{number}.h{head}")
    assert writers == last
    assert model.model.embed_tokens.weight[:, read].abs().sum() == 0


def test_a_seed_gives_the_same_weights_and_another_others():
    one, again = (taught(draw_route(4), 4) for _ in range(2))
    for (name, a), (_, b) in zip(one.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert draw_route(4) != draw_route(7)


def test_the_null_is_trained_and_does_nothing():
    null = PHANTOMS["routed"].null(1)
    assert {known.holds for known in null.card.known} == {False}
    assert share_right(null.subject.model, "gendered_pronoun") < 0.75
    assert share_right(null.subject.model, "facts") < 0.3
