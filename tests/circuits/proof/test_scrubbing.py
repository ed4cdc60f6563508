"""Causal scrubbing against a recursion with the library's own modules, and on programs whose hypothesis is known."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from tests.zoo import ZOO
from tomoscope.circuits import KL, Graph, LogitDifference
from tomoscope.circuits.proof.scrubbing import Claim, Read, scrub
from tomoscope.errors import AlignmentError, DataError, SiteError
from tomoscope.model import build_subject
from tomoscope.phantoms.compiled.specimens import RECIPES

N = 6


@cache
def setting(name: str):
    subject = build_subject(ZOO[name].build().double(), name=name)
    ids = torch.randint(3, 96, (N, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return subject, ids, LogitDifference(list(range(3, 9)), list(range(13, 19)))


EACH, SAME = tuple(range(N)), (0,) * N


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_a_hypothesis_that_says_nothing_false_recovers_all(name: str) -> None:
    subject, ids, metric = setting(name)
    everything = Claim("all", Graph.of(subject).sources, EACH)
    told = scrub(subject, ids, Claim("answer", ("logits",), EACH, (Read(everything),)), metric, draws=2)
    torch.testing.assert_close(told.scrubbed, told.model.expand(2, -1), rtol=1e-9, atol=1e-9)
    assert told.recovered == pytest.approx(1.0)
    assert told.runs == 1
    # a part that reads each of its inputs from the very prompt computes what it computes there
    below = ["embed", "m0", *(f"a0.h{i}" for i in range(4))]
    below += [] if subject.facts.parallel else [f"a1.h{i}" for i in range(4)]
    whole = Claim("mlp", ("m1",), EACH, tuple(Read(Claim(s, (s,), EACH)) for s in below))
    rest = tuple(Read(Claim(s, (s,), EACH)) for s in Graph.of(subject).sources if s != "m1")
    told = scrub(subject, ids, Claim("answer", ("logits",), EACH, (*rest, Read(whole))), metric, draws=1)
    torch.testing.assert_close(told.scrubbed[0], told.model, rtol=1e-9, atol=1e-9)


def test_two_levels_are_what_the_modules_give_one_by_one() -> None:
    """The draws in the order of the code; every value by the library's own modules."""
    subject, ids, metric = setting("gpt2")
    pairs, thirds = (0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2)
    head = Claim("head", ("a0.h1",), thirds)
    mlp = Claim("mlp", ("m1",), pairs, (Read(head),))
    told = scrub(subject, ids, Claim("answer", ("logits",), EACH, (Read(mlp),)), metric, draws=1, seed=5)
    generator = np.random.default_rng(5)

    def agreeing(values, rows):
        places = [[i for i, value in enumerate(values) if value == values[row]] for row in rows]
        return np.array([one[generator.integers(len(one))] for one in places])

    other = generator.integers(0, N, N)
    drawn = agreeing(pairs, range(N))
    below = generator.integers(0, N, N)
    deep = agreeing(thirds, drawn)
    acts = subject.read(
        ids, "layer.0.attn.result[head=1]", "layer.1.resid_mid", "layer.1.mlp.out", "layer.2.resid_post"
    )
    heads, middle = acts["layer.0.attn.result[head=1]"], acts["layer.1.resid_mid"]
    block = subject.model.transformer.h[1]
    with torch.no_grad():
        out = block.mlp(block.ln_2(middle[below] + heads[deep] - heads[below]))
        last = acts["layer.2.resid_post"][other] + out - acts["layer.1.mlp.out"][other]
        logits = subject.unembed(last[:, -1])
    torch.testing.assert_close(told.scrubbed[0], metric(logits, torch.arange(N)), rtol=1e-9, atol=1e-9)
    assert told.runs == 2


def test_queries_and_keys_are_read_apart() -> None:
    """The same source, by the query from one prompt and by the key from another."""
    subject, ids, metric = setting("llama")
    embed = Claim("token", ("embed",), EACH)
    both = Claim("head", ("a0.h1",), EACH, (Read(embed),))
    apart = Claim("head", ("a0.h1",), EACH, (Read(embed, ("q",)), Read(embed, ("k",)), Read(embed, ("v",))))
    for one in (both, apart):
        told = scrub(subject, ids, Claim("answer", ("logits",), EACH, (Read(one),)), metric, draws=1, seed=2)
        other = np.random.default_rng(2).integers(0, N, N)
        assert told.runs == 2
        acts = subject.read(ids, "layer.0.attn.result[head=1]", "layer.2.resid_post")
        heads, last = acts["layer.0.attn.result[head=1]"], acts["layer.2.resid_post"]
        logits = subject.unembed((last[other] + heads - heads[other])[:, -1])
        torch.testing.assert_close(told.scrubbed[0], metric(logits, torch.arange(N)), rtol=1e-8, atol=1e-8)


@cache
def induction():
    """The compiled induction program on prompts of its vocabulary, and its claims."""
    recipe = next(r for r in RECIPES if r.name == "compiled_induction")
    made = recipe.specimen(0)
    words = [list(row) for row in product(made.words.vocabulary, repeat=5)]
    rows = [row for row in words if made.expected(row)[-1] is not None]
    texts = [made.words.text(row) for row in rows]
    answers = [made.expected(row)[-1] for row in rows]
    ids = torch.tensor([made.words.answers[answer] for answer in answers])
    others = torch.tensor([[made.words.answers[w] for w in made.words.vocabulary if w != a] for a in answers])
    return made, texts, rows, answers, LogitDifference(ids, others)


def claims(q: str = "last", copied: str = "all") -> Claim:
    made, _, rows, answers, _ = induction()
    place = made.circuit.places
    everyone = tuple(answers)
    labels = {
        "last": tuple(row[-1] for row in rows), "first": tuple(row[0] for row in rows), "all": tuple(map(tuple, rows)),
        "before": tuple(tuple(row[:-1]) for row in rows), "count": tuple(row.count(row[-1]) for row in rows),
    }  # fmt: skip
    token = Claim("tokens", ("embed",), labels[copied])
    previous = Claim("token before", (place["previous_token"],), labels["before"])
    counts = Claim("count before", (place["previous_count"],), labels["before"])
    count = Claim("count", (place["count"],), labels["count"])
    mine = Claim("own token", ("embed",), labels[q])
    head = Claim(
        "induction", (place["induction"],), everyone,
        (Read(token, ("v",)), Read(previous, ("k",)), Read(counts, ("k",)), Read(mine, ("q",)), Read(count, ("q",))),
    )  # fmt: skip
    return Claim("answer", ("logits",), tuple(range(len(rows))), (Read(head),))


def test_the_program_is_a_true_hypothesis_of_its_weights() -> None:
    made, texts, _, _, metric = induction()
    graph = Graph.of(made.subject, position=True)
    told = scrub(made.subject, texts, claims(), metric, graph=graph, draws=2)
    assert told.recovered == pytest.approx(1.0, abs=1e-6)
    low, high = told.interval()
    assert low <= told.recovered + 1e-9
    assert high >= told.recovered - 1e-9
    # the query of the wrong token, and values of prompts that agree on the first token alone
    for wrong in ({"q": "first"}, {"copied": "first"}):
        other = scrub(made.subject, texts, claims(**wrong), metric, graph=graph, draws=2)
        assert other.interval()[1] < 0.9, wrong
    # one that names the right head and the wrong feature
    head = Claim("induction", (made.circuit.places["induction"],), (0,) * len(texts))
    nothing = scrub(
        made.subject, texts, Claim("answer", ("logits",), tuple(range(len(texts))), (Read(head),)), metric, graph=graph
    )
    assert abs(nothing.recovered) < 0.2


def test_it_is_seeded() -> None:
    subject, ids, metric = setting("gpt2")
    root = Claim("answer", ("logits",), EACH, (Read(Claim("mlp", ("m1",), SAME)),))
    one, same, other = (scrub(subject, ids, root, metric, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.scrubbed, same.scrubbed)
    assert not torch.equal(one.scrubbed, other.scrubbed)
    assert one.interval(seed=1) == same.interval(seed=1)


def test_what_cannot_be_is_refused_before_the_work() -> None:
    subject, ids, metric = setting("gpt2")
    head = Claim("head", ("a1.h0",), EACH)

    def root(*reads: Read, values=EACH) -> Claim:
        return Claim("answer", ("logits",), values, reads)

    cases = [
        (Claim("x", ("m0",), EACH), "Its root"),
        (root(Read(head), values=EACH[:-1]), "5 labels for 6"),
        (root(Read(Claim("late", ("a0.h0",), EACH, (Read(head),)))), "no such edge"),
        (root(Read(Claim("self", ("a1.h0", "m0"), EACH, (Read(head),)))), "reads its own part"),
        (root(Read(Claim("leaf", ("embed",), EACH, (Read(head),)))), "read nothing"),
        (root(Read(Claim("head", ("a1.h0",), EACH, (Read(Claim("e", ("embed",), EACH), ("z",)),)))), "no input 'z'"),
        (root(Read(Claim("head", ("a9.h0",), EACH))), "no node"),
    ]
    for hypothesis, message in cases:
        with pytest.raises((DataError, SiteError), match=message):
            scrub(subject, ids, hypothesis, metric)
    with pytest.raises(AlignmentError, match="tokens, so one"):
        scrub(subject, [ids[0][1:], *ids[1:]], root(Read(head)), KL(torch.zeros(6, 96)))
