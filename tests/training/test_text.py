from __future__ import annotations

import re
from random import Random

import pytest

from tomoscope.data.tasks import agreement, facts, gendered_pronoun, ioi, words
from training import holdout, text


def _many(writer, n: int = 3_000) -> list[str]:
    random = Random("test")
    return [writer(random) for _ in range(n)]


def test_documents_are_a_function_of_the_seed() -> None:
    assert [text.document(Random(7)) for _ in range(3)] == [text.document(Random(7)) for _ in range(3)]
    assert len(set(_many(text.document, 500))) > 480


def test_every_kind_is_written() -> None:
    assert sum(weight for _, weight, _ in text.KINDS.values()) == pytest.approx(1)
    for writer, _, most in text.KINDS.values():
        assert most >= 1
        assert all(_many(writer, 20))


@pytest.mark.parametrize("writer", [text.indirect_object, text.word_list, text.pronoun])
def test_held_out_names_stay_out(writer) -> None:
    seen = {word for document in _many(writer) for word in re.findall(r"\w+", document)}
    assert not seen & holdout.NAMES
    assert len(seen & set(text.OPEN_NAMES)) > 95


def test_held_out_names_have_a_gender_in_stories() -> None:
    stories = _many(text.story, 5_000)
    for name in holdout.NAMES:
        mine = [story for story in stories if re.search(rf"(named|was|day) {name}\b", story)]
        pronoun = "she" if name in words.FEMALE else "he"
        assert len(mine) > 10
        assert any(re.search(rf"\b{pronoun}\b", story, re.I) for story in mine)


def test_held_out_templates_years_and_wordings_stay_out() -> None:
    sentences = _many(text.indirect_object)
    for i, template in enumerate(ioi.TEMPLATES):
        pattern = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(template))
        assert any(re.match(pattern, sentence) for sentence in sentences) == (i not in holdout.IOI_TEMPLATES)
    for sentence in _many(text.years):
        start = re.search(r"(\d\d)(\d\d)", sentence)
        end = int(re.search(r"(\d\d)\.$", sentence).group(1))
        century, year = int(start.group(1)), int(start.group(2))
        assert not holdout.year_held_out(century, year)
        assert end > year
    said = set(_many(text.fact, 20_000))
    for relation, rows in text.FACTS.items():
        for subject, answer in rows.items():
            held = holdout.fact_template_held_out(relation, subject)
            for i, wording in enumerate(facts.TEMPLATES[relation]):
                assert (f"{wording.format(subject=subject)} {answer}." in said) == (i != held)


def test_verbs_agree_and_held_out_subjects_stay_out() -> None:
    singular, plural = {s for s, _ in words.NOUNS}, {p for _, p in words.NOUNS}
    forms = {s: 0 for s, _ in words.VERBS} | {p: 1 for _, p in words.VERBS}
    heads = [template.split("{attractor}")[0] for template in agreement.TEMPLATES["preposition"]]
    checked = 0
    for sentence in _many(text.agreeing):
        tokens = sentence.rstrip(".").split()
        assert (tokens[1] in plural) == (tokens[1] not in singular)
        if any(head.split()[2] == tokens[2] for head in heads):
            assert forms[tokens[5]] == (tokens[1] in plural)
            assert tokens[1].removesuffix("s") not in holdout.SUBJECT_NOUNS
            checked += 1
    assert checked > 500


def test_pronouns_follow_the_name() -> None:
    for sentence in _many(text.pronoun, 500):
        name = next(word for word in re.findall(r"\w+", sentence) if word in text.NAMES)
        assert re.search(r"\bshe\b" if name in words.FEMALE else r"\bhe\b", sentence)
    assert len(gendered_pronoun.TEMPLATES) == 6
