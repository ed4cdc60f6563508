from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomoscope.data import TASKS, single_tokens, task
from tomoscope.data.tasks import agreement, facts, greater_than, words
from tomoscope.errors import DataError

CASES = [(name, corruption) for name, spec in TASKS.items() for corruption in spec.corruptions]


def _only_difference(pair) -> list[tuple[str, str]]:
    """Words that differ between the twins, which have as many words."""
    one, other = pair.clean.text.split(), pair.corrupted.text.split()
    assert len(one) == len(other)
    return [(a, b) for a, b in zip(one, other, strict=True) if a != b]


@pytest.mark.parametrize(("name", "corruption"), CASES)
def test_every_task_aligns_and_is_seeded(byte_bpe, name: str, corruption: str) -> None:
    spec = TASKS[name]
    pairs = spec.make(byte_bpe, 24, seed=5, corruption=corruption)
    assert (pairs.name, pairs.seed, pairs.corruption) == (name, 5, corruption)
    assert len({pair.clean.text for pair in pairs}) == 24
    assert pairs.digest() == spec.make(byte_bpe, 24, seed=5, corruption=corruption).digest()
    assert pairs.digest() != spec.make(byte_bpe, 24, seed=6, corruption=corruption).digest()
    aligned = pairs.encode(byte_bpe)
    assert aligned.first_tokens_suffice
    assert all(len(a) == len(b) for a, b in zip(aligned.clean_ids, aligned.corrupted_ids, strict=True))
    for pair, spans in zip(pairs, aligned.spans, strict=True):
        assert set(spans) <= set(spec.spans)
        assert "end" in spans
        assert pair.clean.text != pair.corrupted.text
        assert not set(pair.answers) & set(pair.wrong)
        assert all(len(tokens) == 1 for row in (*aligned.answer_tokens, *aligned.wrong_tokens) for tokens in row)
    # `end` is the last token, whose logits are read
    assert all(s["end"][1] == len(ids) for s, ids in zip(aligned.spans, aligned.clean_ids, strict=True))


@pytest.mark.parametrize("name", ["ioi", "induction", "gendered_pronoun", "agreement", "colours", "docstring", "facts"])
def test_every_task_works_with_the_space_before_the_text(metaspace_bpe, name: str) -> None:
    pairs = TASKS[name].make(metaspace_bpe, 12)
    for spans, pair in zip(pairs.encode(metaspace_bpe).spans, pairs, strict=True):
        assert set(spans) == set(pair.clean.spans)


def test_tasks_say_how_many_words_are_left(word_level, metaspace_bpe) -> None:
    with pytest.raises(DataError, match=r"'docstring' needs 14 argument words .*, and \d+ of 36 are"):
        TASKS["docstring"].make(word_level, 4)
    with pytest.raises(DataError, match="'greater_than' needs 1 centuries"):
        TASKS["greater_than"].make(metaspace_bpe, 4)
    with pytest.raises(DataError, match="'ioi' needs 6 names that are single tokens, and 2 of 4 are"):
        TASKS["ioi"].make(metaspace_bpe, 4, names=("Mary", "John", "Qqqxz", "Zzyyxw"))


def test_single_tokens_are_tested_in_context(byte_bpe, metaspace_bpe, word_level) -> None:
    kept = single_tokens(byte_bpe, ["Mary", "Qwxzy", "Mary", "ring"])
    assert kept == {"Mary": byte_bpe(" Mary").input_ids[0], "ring": byte_bpe(" ring").input_ids[0]}
    assert list(single_tokens(metaspace_bpe, ["Mary", "ring"])) == ["Mary", "ring"]
    assert metaspace_bpe.convert_ids_to_tokens(single_tokens(metaspace_bpe, ["Mary"])["Mary"]) == "▁Mary"
    # lower case makes one token of two words, and what is unknown is no word
    assert list(single_tokens(word_level, ["Rose", "rose", "Qwxzy"])) in (["Rose"], [])
    assert single_tokens(byte_bpe, []) == {}


def test_ioi_structure(byte_bpe) -> None:
    for order in ("ABBA", "BABA"):
        for pair in TASKS["ioi"].make(byte_bpe, 30, seed=1, corruption="abc", order=order):
            clean, twin = pair.clean, pair.corrupted
            assert clean.words("S1") == clean.words("S2") != clean.words("IO")
            assert pair.answers == (f" {clean.words('IO')}",)
            assert pair.wrong == (f" {clean.words('S1')}",)
            assert (clean.spans["IO"] < clean.spans["S1"]) == (order == "ABBA")
            names = {twin.words(label) for label in ("IO", "S1", "S2")}
            assert len(names | {clean.words("IO"), clean.words("S1")}) == 5


def test_ioi_corruptions(byte_bpe) -> None:
    for pair in TASKS["ioi"].make(byte_bpe, 20, corruption="flip"):
        assert _only_difference(pair) == [(pair.clean.words("S2"), pair.clean.words("IO"))]
    for pair in TASKS["ioi"].make(byte_bpe, 20, corruption="s2_random"):
        ((_, new),) = _only_difference(pair)
        assert new not in pair.clean.text.split()
    for pair in TASKS["ioi"].make(byte_bpe, 20, corruption="random_names"):
        assert pair.corrupted.words("S1") == pair.corrupted.words("S2")
        assert len(_only_difference(pair)) == 3


def test_greater_than_answers(byte_bpe) -> None:
    for pair in TASKS["greater_than"].make(byte_bpe, 40, corruption="year_01"):
        year = int(pair.clean.words("year"))
        assert all(int(text) > year for text in pair.answers)
        assert all(int(text) <= year for text in pair.wrong)
        assert pair.corrupted.words("year") == "01"
        assert pair.clean.text.endswith(" " + pair.clean.words("century"))
    assert set(greater_than.two_part_years(byte_bpe)) == set(range(11, 20))


def test_induction_answers(byte_bpe) -> None:
    for pair in TASKS["induction"].make(byte_bpe, 40, length=6):
        listed = pair.clean.text.split()[1:]
        earlier = listed.index(listed[-1])
        assert pair.answers == (f" {listed[earlier + 1]}",)
        assert pair.clean.words("copied") == listed[earlier + 1]
        assert pair.clean.words("earlier") == pair.clean.words("end") == listed[-1]
        assert pair.wrong == (f" {pair.corrupted.words('copied')}",)
        assert pair.corrupted.words("earlier") == listed[-1]
    for pair in TASKS["induction"].make(byte_bpe, 10, length=6, corruption="no_repeat"):
        twin = pair.corrupted.text.split()[1:]
        assert len(set(twin)) == len(twin)


def test_docstring_answers(byte_bpe) -> None:
    for corruption in TASKS["docstring"].corruptions:
        for pair in TASKS["docstring"].make(byte_bpe, 20, corruption=corruption):
            clean, twin = pair.clean, pair.corrupted
            assert clean.words("A_def") == clean.words("A_doc")
            assert clean.words("B_def") == clean.words("B_doc")
            assert pair.answers == (f" {clean.words('C_def')}",)
            if corruption == "flip":
                assert pair.wrong[0] == f" {twin.words('C_def')}"
            if corruption in ("random_def", "random_both"):
                assert pair.answers[0].strip() not in twin.text.split("\n")[1].replace(",", " ").split()
            if corruption in ("random_doc", "random_both"):
                assert twin.words("A_doc") not in clean.text.split("\n")[1].replace(",", " ").split()


def test_pronouns_agreement_and_colours(byte_bpe) -> None:
    pronouns = TASKS["gendered_pronoun"].make(byte_bpe, 40)
    assert sum(pair.labels["gender"] == "female" for pair in pronouns) in range(15, 26)
    for pair in pronouns:
        assert (pair.clean.words("name") in words.FEMALE) == (pair.answers == (" she",))
        assert (pair.corrupted.words("name") in words.FEMALE) == (pair.answers == (" he",))
    plural = {p for _, p in (*words.NOUNS, *words.VERBS)}
    for corruption in ("flip", "attractor", "random_subject"):
        for pair in TASKS["agreement"].make(byte_bpe, 40, corruption=corruption):
            number = pair.clean.words("subject") in plural
            assert (pair.answers[0].strip() in plural) == number
            assert (pair.clean.words("attractor") in plural) != number
            assert (pair.corrupted.words("subject") in plural) == (number if corruption == "attractor" else not number)
    for corruption in ("flip", "query", "random_colours"):
        for pair in TASKS["colours"].make(byte_bpe, 20, corruption=corruption):
            assert pair.answers == (f" {pair.clean.words('colour')}",)
            assert pair.clean.words("thing") == pair.clean.words("query")
            if corruption == "flip":
                assert pair.wrong[0] == f" {pair.corrupted.words('colour')}"
            if corruption == "query":
                assert pair.corrupted.words("query") != pair.clean.words("query")


def test_facts_know_their_subjects(byte_bpe) -> None:
    rows = (("Mary", "red"), ("John", "blue"), ("Alice", "green"))
    for table in (
        facts.CAPITAL,
        facts.FactTable("colour", rows, ("{subject} likes the colour", "For {subject} it is")),
    ):
        known = dict(table.rows)
        for pair in facts.make(byte_bpe, 4, tables=(table,)):
            assert pair.answers == (f" {known[pair.clean.words('subject')]}",)
            assert pair.wrong == (f" {known[pair.corrupted.words('subject')]}",)


def test_a_table_of_facts_says_what_it_lacks(byte_bpe) -> None:
    with pytest.raises(DataError, match="no {subject}, or more than one"):
        facts.FactTable("x", (("a", "b"), ("c", "d")), ("it is",))
    with pytest.raises(DataError, match="1 rows and 1 templates"):
        facts.FactTable("x", (("a", "b"),), ("{subject} is",))
    with pytest.raises(DataError, match="answers of 'x'"):
        facts.make(byte_bpe, 2, tables=(facts.FactTable("x", (("a", "zzqqy"), ("c", "qqzzy")), ("{subject} is",)),))


def test_mistakes_are_told(byte_bpe) -> None:
    with pytest.raises(DataError, match="no task 'oio'"):
        task("oio")
    assert task("ioi") is TASKS["ioi"]
    for name, spec in TASKS.items():
        with pytest.raises(DataError, match=f"'{name}' has no corruption 'flipp'"):
            spec.make(byte_bpe, 2, corruption="flipp")
        with pytest.raises(DataError, match="at least one"):
            spec.make(byte_bpe, 0)
    one = facts.FactTable("capital", facts.CAPITAL.rows, facts.CAPITAL.templates[:1])
    with pytest.raises(DataError, match=r"makes 28 different prompts of 40"):
        facts.make(byte_bpe, 40, tables=(one,))
    with pytest.raises(DataError, match="no order"):
        TASKS["ioi"].make(byte_bpe, 2, order="AABB")
    with pytest.raises(DataError, match="no kind 'simple' with corruption 'attractor'"):
        TASKS["agreement"].make(byte_bpe, 2, kinds=("simple",), corruption="attractor")
    with pytest.raises(DataError, match="no choice"):
        TASKS["agreement"].make(byte_bpe, 2, attractors="none")
    with pytest.raises(DataError, match="at least two"):
        TASKS["colours"].make(byte_bpe, 2, count=1)


def test_simple_agreement_has_no_attractor(byte_bpe) -> None:
    pairs = agreement.make(byte_bpe, 40, kinds=("simple",))
    assert all(set(pair.clean.spans) == {"subject", "end"} for pair in pairs)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10_000), n=st.integers(1, 8))
def test_any_seed_and_number_gives_aligned_pairs(byte_bpe, case: tuple[str, str], seed: int, n: int) -> None:
    pairs = TASKS[case[0]].make(byte_bpe, n, seed=seed, corruption=case[1])
    assert len(pairs) == n
    assert len(pairs.encode(byte_bpe)) == n


@pytest.mark.parametrize("name", ["ioi", "induction", "gendered_pronoun", "agreement", "colours", "docstring"])
def test_a_real_story_tokenizer_keeps_enough_words(stories_tokenizer, name: str) -> None:
    pairs = TASKS[name].make(stories_tokenizer, 50)
    aligned = pairs.encode(stories_tokenizer)
    for pair, spans, ids in zip(pairs, aligned.spans, aligned.clean_ids, strict=True):
        for label, (start, end) in spans.items():
            assert pair.clean.words(label) in stories_tokenizer.decode(list(ids[start:end]))


def test_a_real_story_tokenizer_knows_no_years_or_capitals(stories_tokenizer) -> None:
    for name in ("greater_than", "facts"):
        with pytest.raises(DataError, match="0 of"):
            TASKS[name].make(stories_tokenizer, 4)
