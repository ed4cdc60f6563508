"""Every program on every input up to a length: weights, interpreter and plain Python agree."""

from __future__ import annotations

import operator

import pytest

from tests.phantoms.compiled.oracles import CASES, Case
from tomoscope.phantoms.compiled import (
    Compiled,
    aggregate,
    compile_program,
    constant,
    indices,
    length,
    select,
    select_all,
    selector_width,
    sequence_map,
    tokens,
)
from tomoscope.phantoms.compiled.compiler import largest_error
from tomoscope.phantoms.compiled.interpret import all_inputs

EXACT = 1e-7


def agree(case: Case, compiled: Compiled) -> None:
    inputs = list(all_inputs(tuple(case.vocabulary), compiled.shape.max_length))
    promised = 0
    for words in inputs:
        right = case.oracle(words)
        if right is not None:
            promised += 1
            assert compiled.expected(words) == right, words
    assert promised
    assert largest_error(compiled.model, compiled.words, inputs, [compiled.expected(words) for words in inputs]) < EXACT
    for words, answers in zip(inputs, compiled.answers(inputs), strict=True):
        right = compiled.expected(words)
        assert answers == (pytest.approx([float(x) for x in right], abs=EXACT) if compiled.program.numerical else right)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"extra_heads": 2, "extra_neurons": 5, "basis": "rotated", "seed": 1}], ids=["plain", "rotated"]
)
def test_every_input(name, options):
    agree(CASES[name], CASES[name].compile(**options))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_longer_input(name):
    case = CASES[name]
    agree(case, case.compile(max_length=case.larger, seed=2))


def test_float32_answers_are_right():
    compiled = CASES["sort"].compile(dtype="float32")
    inputs = list(all_inputs((3, 5, 8), 5))
    assert compiled.answers(inputs) == [sorted(words) for words in inputs]
    assert compiled.subject.facts.dtype == "float32"


SELECTORS = {
    "and": select(tokens, tokens, operator.eq) & select(indices, indices, operator.lt),
    "or": select(tokens, tokens, operator.eq) | select(indices, indices, operator.lt),
    "not": ~select(tokens, tokens, operator.eq),
    "not_and": ~(select(tokens, tokens, operator.eq) & select(indices, indices, operator.lt)),
    "same_operands": select(tokens, tokens, operator.lt) | select(tokens, tokens, operator.eq),
    "three": (select(tokens, tokens, operator.lt) | select(indices, indices, operator.eq))
    & ~select(tokens, indices, lambda k, q: (k == "b") == (q % 2)),
    "constant_key": select(constant(1), indices, operator.eq),
    "constant_query": select(tokens, constant("b"), operator.le) | select(constant(0), indices, operator.eq),
    "all": select_all,
    "none": ~select_all,
}
HOLDS = {
    "and": lambda w, k, q: w[k] == w[q] and k < q,
    "or": lambda w, k, q: w[k] == w[q] or k < q,
    "not": lambda w, k, q: w[k] != w[q],
    "not_and": lambda w, k, q: not (w[k] == w[q] and k < q),
    "same_operands": lambda w, k, q: w[k] <= w[q],
    "three": lambda w, k, q: (w[k] < w[q] or k == q) and (w[k] == "b") != (q % 2),
    "constant_key": lambda w, k, q: q == 1,
    "constant_query": lambda w, k, q: w[k] <= "b" or q == 0,
    "all": lambda w, k, q: True,
    "none": lambda w, k, q: False,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_count_average_and_default(name, causal):
    """Width, the mean of a number, and what either becomes in a second layer that reads it across positions."""
    holds, inputs = HOLDS[name], list(all_inputs(tuple("abc"), 4))
    number = tokens.map({"a": 0.5, "b": -1, "c": 3}.get, numerical=True)
    width, mean = selector_width(SELECTORS[name]), aggregate(SELECTORS[name], number)
    # the widths of others, through keys and through values: what stands at BOS must not leak
    zeros = selector_width(select(width, constant(0), operator.eq))
    again = aggregate(SELECTORS[name], width.map(lambda value: value + 1, numerical=True))
    for program, of in ((width, "width"), (mean, "mean"), (zeros, "zeros"), (again, "again")):
        compiled = compile_program(program, vocabulary="abc", max_length=4, causal=causal)
        assert compiled.exhaustive
        answers = compiled.answers(inputs)
        for words, got in zip(inputs, answers, strict=True):
            n = len(words)
            seen = [[k for k in range(q + 1 if causal else n) if holds(words, k, q)] for q in range(n)]
            values = [{"a": 0.5, "b": -1, "c": 3}[word] for word in words]
            widths = [len(row) for row in seen]
            right = {
                "width": widths,
                "mean": [sum(values[k] for k in row) / len(row) if row else 0 for row in seen],
                "zeros": [widths[: q + 1 if causal else n].count(0) for q in range(n)],
                "again": [sum(widths[k] + 1 for k in row) / len(row) if row else 0 for row in seen],
            }[of]
            assert got == (pytest.approx(right, abs=1e-7) if program.numerical else right), (of, words)


def test_no_value_stays_none_and_is_selected_by_nothing():
    before = aggregate(select(indices, indices, lambda key, query: key == query - 1), tokens)
    mapped = before.map(str.upper)
    joined = sequence_map(lambda one, other: one + other, mapped, tokens)
    as_number = before.map(lambda token: 2 if token == "a" else 1, numerical=True)
    unlike = selector_width(~select(before, tokens, operator.eq))
    programs = {
        joined: lambda w: [None, *(w[i - 1].upper() + w[i] for i in range(1, len(w)))],
        as_number: lambda w: [0, *(2 if t == "a" else 1 for t in w[:-1])],
        unlike: lambda w: [sum(w[k - 1] != w[q] for k in range(1, len(w))) for q in range(len(w))],
    }
    inputs = list(all_inputs(tuple("ab"), 5))
    for program, right in programs.items():
        for words, got in zip(
            inputs, compile_program(program, vocabulary="ab", max_length=5).answers(inputs), strict=True
        ):
            assert got == (pytest.approx(right(words), abs=EXACT) if program.numerical else right(words))


def test_numbers_are_added_and_cut_into_steps():
    share = aggregate(select_all, tokens.map(lambda token: token == "a", numerical=True))
    other = aggregate(select(indices, indices, operator.le), tokens.map(lambda token: token == "b", numerical=True))
    shifted = sequence_map(lambda one, two: 2 * one - two / 2 + 3, share, other)
    level = shifted.map(lambda value: "high" if value > 4 else "low" if value < 3 else "middle")
    bent = shifted.map(lambda value: abs(value - 4), numerical=True)
    inputs = list(all_inputs(tuple("abc"), 4))
    for words, labels, numbers in zip(
        inputs,
        compile_program(level, vocabulary="abc", max_length=4).answers(inputs),
        compile_program(bent, vocabulary="abc", max_length=4).answers(inputs),
        strict=True,
    ):
        for i in range(len(words)):
            value = 2 * words.count("a") / len(words) - words[: i + 1].count("b") / (i + 1) / 2 + 3
            assert labels[i] == ("high" if value > 4 + 1e-9 else "low" if value < 3 - 1e-9 else "middle")
            assert numbers[i] == pytest.approx(abs(value - 4), abs=1e-7)


def test_a_program_too_large_to_run_whole_is_still_right():
    compiled = compile_program(CASES["reverse"].program(), vocabulary="abcdefgh", max_length=10)
    assert not compiled.exhaustive
    words = tuple("hgfedcbaab")
    assert compiled.answers([words, words[:3]]) == [list(words[::-1]), list(words[:3][::-1])]


def test_the_seed_moves_parts_and_keeps_answers():
    one, two = (CASES["balanced"].compile(seed=seed, extra_heads=3) for seed in (0, 1))
    assert one.circuit.places != two.circuit.places
    assert one.answers(["( ( ) )"]) == two.answers(["( ( ) )"]) == [["no", "no", "no", "yes"]]
    same = CASES["balanced"].compile(seed=1, extra_heads=3)
    assert all(
        (a == b).all() for a, b in zip(two.model.state_dict().values(), same.model.state_dict().values(), strict=True)
    )


def test_length_counts():
    assert compile_program(length, vocabulary="ab", max_length=3).answers(["a b a"]) == [[3, 3, 3]]
