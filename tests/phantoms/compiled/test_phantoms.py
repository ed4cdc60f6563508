"""Compiled phantoms: cards, pairs, nulls, patching; saving and opening; errors that say what to do."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
import torch

from tests.phantoms.compiled.oracles import CASES
from tomoscope.circuits import activation_patching
from tomoscope.errors import DataError, PromptError
from tomoscope.model import open_model
from tomoscope.phantoms import PHANTOMS, Card
from tomoscope.phantoms.compiled import (
    Selector,
    aggregate,
    compile_program,
    constant,
    indices,
    length,
    make_pairs,
    select,
    select_all,
    selector_width,
    sequence_map,
    tokens,
)
from tomoscope.phantoms.compiled.rasp import SOp, Tokens

NAMES = [name for name in PHANTOMS if PHANTOMS[name].kind == "compiled"]


def differences(specimen, prompts):
    """Right less wrong logit at the last token of the prompts of the specimen's pairs."""
    pairs = specimen.data["pairs"].encode(specimen.subject.tokenizer)
    logits = specimen.subject.last_logits(list(prompts))
    right, wrong = (torch.from_numpy(ids[:, 0]) for ids in (pairs.answer_ids, pairs.wrong_ids))
    rows = torch.arange(len(logits))
    return logits[rows, right] - logits[rows, wrong]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_phantom_does_its_task_and_its_null_does_not(name, seed):
    specimen = PHANTOMS[name].build(seed)
    subject, pairs = specimen.subject, specimen.data["pairs"]
    assert not subject.facts.unsolved
    assert subject.facts.parity == 0.0
    assert subject.facts.kind == ("decoder" if subject.config.is_causal else "encoder")
    assert len(pairs) >= 8
    assert len({len(pair.clean.text.split()) for pair in pairs}) == 1
    clean, corrupted = differences(specimen, pairs.clean), differences(specimen, pairs.corrupted)
    if specimen.words.answers:
        assert float(clean.min()) > 9.99
        assert float(corrupted.max()) < -9.99
    else:
        assert bool((clean > corrupted + 0.01).all())
        for pair, value in zip(pairs, clean.tolist(), strict=True):
            assert value == pytest.approx(float(specimen.expected(pair.clean.text)[-1]), abs=1e-7)
    for pair in pairs:
        one, other = pair.clean.text.split(), pair.corrupted.text.split()
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
    assert Card.from_json(specimen.card.to_json()) == specimen.card
    null = PHANTOMS[name].null(seed)
    assert [(known.kind, known.value) for known in null.card.known] == [(k.kind, k.value) for k in specimen.card.known]
    assert all(known.holds for known in specimen.card.known)
    assert not any(known.holds for known in null.card.known)
    assert null.subject.config.to_dict() == subject.config.to_dict()
    assert null.subject.tokenizer.get_vocab() == subject.tokenizer.get_vocab()
    assert null.data["pairs"].digest() == pairs.digest()
    assert float(differences(null, pairs.clean).abs().max()) < 3


def test_seeds_vary_vocabulary_places_and_basis():
    cards = [PHANTOMS["compiled_histogram"].build(seed).card for seed in range(4)]
    assert len({card.description for card in cards}) > 1
    assert len({str(next(iter(card.of("circuit"))).value) for card in cards}) > 1
    again = PHANTOMS["compiled_histogram"].build(2).card
    assert again == cards[2]


def test_patching_finds_the_last_head_of_reverse():
    specimen = PHANTOMS["compiled_reverse"].build(0)
    pairs = specimen.data["pairs"][:12]
    grid = activation_patching(specimen.subject, pairs, part="attn.z")
    effect = grid.normalised.nan_to_num()  # [layer, position, head]
    layer, _, head = specimen.circuit.places["reverse"][1:].partition(".h")
    best = effect.amax(1)
    assert best.flatten().argmax() == best.shape[1] * int(layer) + int(head)
    assert float(best.max()) == pytest.approx(1.0, abs=1e-6)
    best[int(layer), int(head)] = 0
    # the tokens are read by that head alone, so nothing before it differs
    assert float(best.abs().max()) < 1e-6


def test_heads_of_induction_have_their_roles():
    specimen = PHANTOMS["compiled_induction"].build(1)
    subject, words = specimen.subject, sorted(specimen.words.vocabulary)
    (previous,), (induction,) = (
        next(k.value["heads"] for k in specimen.card.of("head_role") if k.value["role"] == role)
        for role in ("previous_token", "induction")
    )
    text = " ".join([*words, *words])
    patterns = subject.read([text], "layer.*.attn.pattern")
    n = len(words)
    first = patterns[f"layer.{previous[0]}.attn.pattern"][0, previous[1]]
    assert all(float(first[q, q - 1]) > 1 - 1e-6 for q in range(1, 2 * n + 1))
    last = patterns[f"layer.{induction[0]}.attn.pattern"][0, induction[1]]
    assert all(float(last[q, q - n + 1]) > 1 - 1e-6 for q in range(n + 1, 2 * n + 1))


def test_padding_on_either_side_changes_nothing():
    for name in ("reverse", "induction"):
        compiled = CASES[name].compile(seed=1, extra_heads=1)
        texts = ["a b c a b", "b", "c a"]
        alone = [compiled.subject.last_logits([text])[0] for text in texts]
        together = compiled.subject.last_logits(texts)
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-6)
        for row, logits in enumerate(compiled.logits(texts)):
            torch.testing.assert_close(logits[-1], alone[row], rtol=0, atol=1e-6)


def test_every_site_can_be_read_and_the_library_sees_both_directions():
    compiled = CASES["reverse"].compile(extra_heads=1)
    assert all(info.available for name, info in compiled.subject.sites().items() if not name.endswith("router"))
    assert {term.path for term in compiled.subject.structure.embed_terms} == {"transformer.wte", "transformer.wpe"}
    for kernel in ("eager", "sdpa"):
        compiled.model.set_attn_implementation(kernel)
        assert compiled.answers(["a b c"]) == [["c", "b", "a"]]
    pattern = compiled.subject.read(["a b c"], "layer.2.attn.pattern")["layer.2.attn.pattern"][0]
    layer, head = compiled.circuit.places["reverse"][1:].split(".h")
    assert layer == "2"
    assert float(pattern[int(head), 1, 3]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["reverse", "fraction", "balanced"])
def test_saved_and_opened_it_gives_equal_logits(name, tmp_path):
    compiled = CASES[name].compile(seed=3, extra_heads=1, extra_neurons=2, basis="rotated")
    compiled.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    opened = open_model(tmp_path)
    texts = [
        compiled.words.text(words) for words in [tuple(compiled.words.vocabulary), tuple(compiled.words.vocabulary)[:1]]
    ]
    assert opened.facts.dtype == "float64"
    assert opened.facts.kind == compiled.subject.facts.kind
    assert opened.tokens(texts[0]).input_ids.tolist() == compiled.subject.tokens(texts[0]).input_ids.tolist()
    for text in texts:
        assert torch.equal(opened.run([text]).logits, compiled.subject.run([text]).logits)
    assert Card.from_json((tmp_path / "card.json").read_text()) == compiled.card


def test_pairs_need_an_answer_that_changes():
    compiled = compile_program(length, vocabulary="ab", max_length=4)
    with pytest.raises(DataError, match="no prompts"):
        make_pairs(compiled, 4, seed=0)


SHARE = aggregate(select_all, tokens.map(lambda token: token == "a", numerical=True))
WIDE = selector_width(
    Selector(
        tuple(
            term
            for step in range(6)
            for term in select(
                sequence_map(lambda token, index, step=step: (token, index, step), tokens, indices),
                indices,
                operator.eq,
            ).terms
        )
    )
)
BAD = {
    "no program": (3, {}, "not a sequence operation"),
    "only tokens": (tokens, {}, "needs no network"),
    "unbounded categories": (
        sequence_map(lambda a, b: (a, b), sequence_map(lambda a, b: (a, b), tokens, indices), indices),
        {"max_length": 30},
        "categories",
    ),
    "unbounded numbers": (
        aggregate(select_all, tokens.map({"a": 1, "b": Fraction(1, 7), "c": Fraction(3, 11)}.get, numerical=True)).map(
            bool
        ),
        {"max_length": 40},
        "numbers",
    ),
    "infinite": (tokens.map(lambda token: float("inf"), numerical=True), {}, "no finite number"),
    "text as number": (tokens.map(lambda token: token, numerical=True), {}, "no finite number"),
    "nothing as category": (tokens.map(lambda token: None), {}, "can't be a category"),
    "list as category": (tokens.map(lambda token: [token]), {}, "can't be a category"),
    "a function that raises": (tokens.map(lambda token: {"a": 1}[token]), {}, "raised KeyError"),
    "a predicate that raises": (selector_width(select(tokens, indices, operator.lt)), {}, "raised TypeError"),
    "not linear": (sequence_map(lambda one, two: one * two, SHARE, SHARE), {}, "not linear"),
    "an ambiguous copy": (aggregate(select_all, tokens), {}, "different ones are selected"),
    "two answers with one text": (tokens.map({"a": 1, "b": "1", "c": 2}.get), {}, "same text"),
    "too wide": (WIDE, {"max_length": 150}, "dimensions of the stream"),
    "no vocabulary": (length, {"vocabulary": ()}, "is empty"),
    "a word with a space": (length, {"vocabulary": ("a b", "c")}, "has 'a b'"),
    "a special word": (length, {"vocabulary": ("<bos>",)}, "has '<bos>'"),
    "one text twice": (length, {"vocabulary": (1, "1")}, "two tokens with one text"),
    "no length": (length, {"max_length": 0}, "max_length is 0"),
    "a strange type": (length, {"dtype": "float8"}, "dtype is"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_programs_say_why(what):
    program, options, message = BAD[what]
    with pytest.raises(DataError, match=message) as caught:
        compile_program(program, **{"vocabulary": "abc", "max_length": 4, **options})
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select(SHARE, tokens, operator.eq), "can't compare numbers"),
        (lambda: select("abc", tokens, operator.eq), "not a sequence operation"),
        (lambda: aggregate(tokens, tokens), "not a selector"),
        (lambda: selector_width(3), "not a selector"),
        (lambda: aggregate(select_all, constant(1)), "constant can't be aggregated"),
        (lambda: sequence_map(operator.add, SHARE, indices), "one operation of numbers and one of categories"),
    ],
)
def test_bad_operations_say_why(make, message):
    with pytest.raises(DataError, match=message) as caught:
        make()
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "no tokens"), ("a d", "'d' is not in"), (("a", 1), "1 is not in"), ("a a a a a a", "at most 5")],
)
def test_bad_prompts_say_why(prompt, message):
    compiled = CASES["reverse"].compile()
    for ask in (compiled.expected, lambda one: compiled.answers([one])):
        with pytest.raises(PromptError, match=message) as caught:
            ask(prompt)
        assert caught.value.remedy


def test_operations_are_equal_by_what_they_compute():
    assert tokens.named("words") == Tokens()
    assert select(tokens, tokens, operator.eq) == select(tokens, tokens, operator.eq)
    assert isinstance(constant(2).map(lambda value: value + 1), SOp)
    assert sequence_map(operator.add, constant(1), indices).inputs == (indices,)
