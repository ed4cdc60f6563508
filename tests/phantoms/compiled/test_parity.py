"""Against the numbers of the public implementation of Tracr: the same answers, the same parts reading each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.phantoms.compiled.oracles import fraction_of_x, histogram
from tomoscope.phantoms.compiled import (
    aggregate,
    compile_program,
    indices,
    length,
    programs,
    select,
    sequence_map,
    tokens,
)

REFERENCE = Path(__file__).parents[2] / "reference" / "compiled"


def reverse_in_two_steps():
    """The reference reverses by length - index, then less 1: two MLPs."""
    opposite = sequence_map(lambda n, index: n - index, length, indices)
    return aggregate(select(indices, opposite.map(lambda value: value - 1), lambda key, query: key == query), tokens)


PROGRAMS = {
    "reverse": reverse_in_two_steps,
    "hist": programs.histogram,
    "frac_prevs": lambda: programs.fraction_so_far("x"),
}
LEFT_OUT = {
    # Theirs writes these edges, and nothing comes of them. Our biases are biases, not a direction "one" that is read;
    # "every token" is a head whose scores are all equal, which compares no tokens; and what an MLP writes at BOS is
    # switched off only where another position reads it, and nobody does here.
    "reverse": {("input", "a0.h0<q>"), ("input", "a0.h0<k>"), ("input", "m0"), ("input", "a3.h0<q>")},
    "hist": {("input", "m0")},
    "frac_prevs": set(),
}


def reference(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


def compiled_as(name):
    theirs = reference(name)
    vocabulary = [word for word in theirs["encoding"] if word not in ("BOS", "compiler_pad")]
    longest = max(len(words) for words in theirs["inputs"])
    return compile_program(PROGRAMS[name](), vocabulary=vocabulary, max_length=max(longest, 5), causal=False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_answers(name):
    theirs, ours = reference(name), compiled_as(name)
    inputs = [tuple(str(word) for word in words) for words in theirs["inputs"]]
    for words, right, answers in zip(inputs, theirs["decoded"], ours.answers(inputs), strict=True):
        if theirs["categorical"]:
            assert [str(answer) for answer in answers] == right[1:]
        else:
            assert answers == pytest.approx([float(value) for value in right[1:]], abs=1e-5), words


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_parts_read_each_other(name):
    theirs, ours = reference(name), compiled_as(name)
    assert ours.subject.facts.n_layers == theirs["config"]["n_layers"]
    assert ours.subject.facts.n_heads == theirs["config"]["n_heads"]
    mine = {tuple("input" if end in ("embed", "position") else end for end in edge) for edge in ours.circuit.edges}
    truth = {tuple(edge) for edge in theirs["ground_truth"]["edges"]}
    assert truth - mine == LEFT_OUT[name]
    assert mine <= truth
    # what is left out carries BOS, the bias, or tokens whose comparison is always true
    labels = dict(zip(map(tuple, theirs["ground_truth"]["edges"]), theirs["ground_truth"]["labels"], strict=True))
    for edge in LEFT_OUT[name]:
        assert edge[1].startswith("a0") or set(labels[edge]) <= {"one", "tokens:BOS"}


def test_the_reference_agrees_with_plain_python():
    for name, oracle in (("hist", histogram), ("frac_prevs", fraction_of_x)):
        for words, right in zip(reference(name)["inputs"], reference(name)["decoded"], strict=True):
            assert [float(value) for value in right[1:]] == pytest.approx([float(v) for v in oracle(words)])
