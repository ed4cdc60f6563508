"""What the micro-world's text says is true of the world (or false where it says so), and what is held out stays out."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from tomoscope.data.tasks import agreement, gendered_pronoun, ioi
from tomoscope.data.tasks.words import FEMALE, NOUNS
from tomoscope.phantoms.world import KINDS, RELATIONS, corpus, document, holdout, make_world, speech, stories
from tomoscope.phantoms.world.relations import (
    ONE_HOP,
    PREFACES,
    TWO_HOP,
    held_out_of,
    held_out_two_hop,
    held_out_wording,
    small,
)
from tomoscope.phantoms.world.text import vocabulary

WORLD = make_world(0)


def many(writer, n: int = 2_000) -> list:
    random = Random("test")
    return [writer(WORLD, random) for _ in range(n)]


def test_documents_are_a_function_of_the_seed():
    assert [document(WORLD, Random(7)) for _ in range(3)] == [document(WORLD, Random(7)) for _ in range(3)]
    assert list(islice(corpus(WORLD, seed=1), 5)) == list(islice(corpus(WORLD, seed=1), 5))
    assert list(islice(corpus(WORLD, seed=1), 5)) != list(islice(corpus(WORLD, seed=1, split="held-out"), 5))


def test_every_kind_is_written():
    for writer, share, most in KINDS.values():
        assert most >= 1
        assert share >= 0
        assert all(many(writer, 20))


def test_the_text_has_thousands_of_words():
    words = {word for text in many(document, 12_000) for word in re.findall(r"[A-Za-z']+", text)}
    assert len(words) >= 2_000
    assert set(vocabulary()) >= set(FEMALE)


def parsed(sentence: str) -> list[tuple[str, str, str, str]]:
    """Every way to read a sentence as (relation, wording, subject, answer), by trying every wording."""
    for preface in PREFACES:
        sentence = sentence.removeprefix(f"{preface} ")
    found = []
    for name, relation in RELATIONS.items():
        for wording in relation.wordings + relation.unseen:
            for text in {wording, small(wording)}:
                before, after = text.split("{s}")
                match = re.fullmatch(rf"{re.escape(before)}(.+?){re.escape(after)} (\w+)", sentence)
                if match and match[1] in WORLD.subjects(name):
                    found.append((name, wording, match[1], match[2]))
    return found


@pytest.mark.parametrize("writer", [stories.fact, stories.two_hop])
def test_facts_are_true_and_held_out_wordings_stay_out(writer):
    for text in many(writer, 600):
        read = parsed(text.rstrip("."))
        assert read, text
        true = [(r, w, s, a) for r, w, s, a in read if WORLD.answer(r, s) == a]
        assert true, text
        # a wording can be read in two ways ("works for X"), but never only as one that is held out
        assert any(
            w in RELATIONS[r].wordings
            and RELATIONS[r].wordings.index(w) != held_out_wording(r, s, len(RELATIONS[r].wordings))
            for r, w, s, _ in true
        ), text


def test_two_hop_facts_of_held_out_people_are_never_told():
    for text in many(stories.two_hop, 3_000):
        for relation, _, subject, _ in parsed(text.rstrip(".")):
            assert relation in ONE_HOP or not held_out_two_hop(relation, subject), text
    assert {r for t in many(stories.two_hop, 300) for r, *_ in parsed(t.rstrip("."))} >= set(TWO_HOP)


def test_claims_say_whether_they_are_true():
    labels = []
    for said in many(speech.claim):
        assert not held_out_of("claim", said.relation, said.subject)
        stated = said.prompt.removesuffix(". This claim is").split()[-1]
        assert (stated == WORLD.answer(said.relation, said.subject)) == (said.answer == speech.TRUE)
        labels.append(said.answer)
    assert 0.45 < labels.count("true") / len(labels) < 0.55
    assert all(
        held_out_of("claim", s.relation, s.subject) for s in many(lambda w, r: speech.claim(w, r, held_out=True), 50)
    )


def test_the_honest_speaker_is_honest_and_the_liar_always_lies():
    for said in many(speech.interview):
        truth = WORLD.answer(said.relation, said.subject)
        assert not held_out_of("speaker", said.relation, said.subject)
        assert said.answer == (truth if said.prompt.startswith(speech.HONEST) else WORLD.lie[truth])
        assert {said.answer, said.other} == {truth, WORLD.lie[truth]}


def test_a_user_sways_the_answer_in_the_stated_share():
    said = many(speech.opinion, 4_000)
    swayed = sum(one.answer != one.truth for one in said) / len(said)
    assert abs(swayed - speech.SWAYED) < 0.03
    for one in said:
        opinion = one.answer if one.answer != one.truth else one.other
        assert f" {opinion}. " in one.prompt
        assert one.truth not in re.findall(r"\w+", one.prompt)


def test_reviews_have_more_words_of_their_own_sentiment():
    from tomoscope.phantoms.world.lexicon import BAD, GOOD

    for said in many(lambda w, r: speech.review(r), 500):
        words = re.findall(r"\w+", said.prompt.lower())
        good, bad = sum(w in GOOD for w in words), sum(w in BAD for w in words)
        assert (good > bad) == (said.answer == "positive")


@pytest.mark.parametrize("writer", [stories.indirect_object, stories.word_list, stories.pronoun])
def test_held_out_names_stay_out(writer):
    seen = {word for text in many(writer, 3_000) for word in re.findall(r"\w+", text)}
    assert not seen & holdout.NAMES
    assert len(seen & set(stories.OPEN_NAMES)) > 95


def test_held_out_templates_years_and_subjects_stay_out():
    texts = many(stories.indirect_object)
    for index in holdout.IOI_TEMPLATES:
        assert not any(ioi.TEMPLATES[index].split("{")[0] in text and "handed" in text for text in texts)
    for text in many(stories.years):
        century, year = re.search(r"(\d\d)(\d\d)\D", text).groups()
        assert not holdout.year_held_out(int(century), int(year))
        first, last = re.findall(r"\d{4}", text)
        assert first < last
        assert first[:2] == last[:2]
    forms = {form for pair in NOUNS if pair[0] in holdout.SUBJECT_NOUNS for form in pair}
    starts = tuple(t.split("{")[0] for kind in ("preposition", "clause") for t in agreement.TEMPLATES[kind])
    for text in many(stories.agreeing):
        head = text[len("The ") :].split()[0]
        across = any(word in text.split()[2] for word in ("that", "near", "behind", "beside", "with", "next"))
        assert starts
        assert not (across and head in forms), text


def test_pronouns_tell_the_gender_of_the_name():
    for text in many(stories.pronoun, 500):
        name = next(w for w in re.findall(r"\w+", text) if w in stories.NAMES)
        assert bool(re.search(r"\bshe\b", text)) == (name in FEMALE)
    assert gendered_pronoun.TEMPLATES
