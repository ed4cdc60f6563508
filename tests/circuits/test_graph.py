"""The graph of a model's nodes and edges: names, order, and what may feed what."""

from functools import cache

import pytest

from tests.zoo import ZOO
from tomoscope import open_model
from tomoscope.circuits import Graph
from tomoscope.errors import SiteError

DECODERS = [name for name, entry in ZOO.items() if entry.kind == "decoder"]


@cache
def graph(name: str, *, position: bool = False) -> Graph:
    return Graph.of(open_model(ZOO[name].build()), position=position)


def test_sources_and_destinations_are_in_the_models_order():
    g = graph("gpt2")
    assert g.sources[:6] == ("embed", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0")
    assert g.destinations[:5] == ("a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h3<q>", "a0.h0<k>")
    assert g.destinations[12] == "m0"
    assert g.destinations[-1] == "logits"
    assert graph("gpt2", position=True).sources[:2] == ("embed", "position")


@pytest.mark.parametrize("name", DECODERS)
def test_an_edge_goes_from_what_is_computed_before(name: str):
    if name == "openai_gpt":  # its stream is normalised after each write
        with pytest.raises(SiteError, match="does not simply add"):
            graph(name)
        return
    g = graph(name)
    parallel = open_model(ZOO[name].build()).facts.parallel
    for source, destination in g.names(g.allowed):
        writer, reader = g.writers[g.sources.index(source)], g.readers[g.destinations.index(destination)]
        if writer.layer == reader.layer:
            assert (writer.kind, reader.kind, parallel) in {("head", "mlp", False), ("attention", "mlp", False)}
        else:
            assert writer.layer < reader.layer
    # a closed form: every pair of layers, and within a layer heads -> MLP where the block is sequential
    heads = [sum(w.kind in ("head", "attention") for w in g.writers if w.layer == i) for i in range(g.n_layers)]
    inputs = [sum(r.kind in ("head", "attention") for r in g.readers if r.layer == i) for i in range(g.n_layers)]
    mlps = [sum(r.kind == "mlp" for r in g.readers if r.layer == i) for i in range(g.n_layers)]
    expected = sum(
        (1 + sum(heads[:i]) + sum(mlps[:i])) * (inputs[i] + mlps[i]) + (0 if parallel else heads[i] * mlps[i])
        for i in range(g.n_layers)
    )
    assert g.n_edges == expected + 1 + sum(heads) + sum(mlps)


def test_shared_keys_and_values_have_one_input_a_group():
    g = graph("llama")
    assert [d for d in g.destinations if d.startswith("a1.")] == [
        *(f"a1.h{i}<q>" for i in range(4)), *(f"a1.kv{i}<k>" for i in range(2)), *(f"a1.kv{i}<v>" for i in range(2))
    ]  # fmt: skip
    assert [g.destinations[i] for i in g.inputs_of("a1.h3")] == ["a1.h3<q>", "a1.kv1<k>", "a1.kv1<v>"]
    assert [g.destinations[i] for i in g.inputs_of("m1")] == ["m1"]
    assert g.inputs_of("embed") == []


def test_keys_that_arrive_repeated_still_belong_to_their_group():
    g = graph("falcon")
    assert [g.destinations[i] for i in g.inputs_of("a1.h3")] == ["a1.h3<q>", "a1.kv1<k>", "a1.kv1<v>"]


def test_compressed_keys_make_attention_one_node():
    g = graph(next(name for name in DECODERS if "deepseek" in name))
    assert "a0" in g.sources
    assert "a0" in g.destinations
    assert not any(".h" in s for s in g.sources)


def test_masks_and_names_are_each_others_inverse():
    g = graph("gpt2")
    mask = g.mask(["embed->a0.h0<q>", ("a0.h1", "m2"), "m2->logits"])
    assert mask.sum() == 3
    assert g.names(mask) == [("embed", "a0.h0<q>"), ("a0.h1", "m2"), ("m2", "logits")]


@pytest.mark.parametrize("edge", ["m1->m0", "a0.h9->m2", "embed->a0.h0", "a1.h0->a1.h1<q>"])
def test_an_edge_that_cannot_be_is_refused(edge: str):
    with pytest.raises(SiteError):
        graph("gpt2").mask([edge])


def test_a_stream_that_is_normalised_after_each_write_has_no_edges():
    with pytest.raises(SiteError, match="does not simply add"):
        graph("bert")
