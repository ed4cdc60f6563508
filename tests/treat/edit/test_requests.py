"""Requests: the field's file formats read, nonsense refused with the reason."""

from __future__ import annotations

import json

import pytest

from tests.treat.edit.made import FACTS, subject
from tomoscope.errors import DataError, EditError
from tomoscope.treat.edit.requests import (
    EditRequest,
    Probe,
    check_requests,
    encode_labelled,
    read_counterfact,
    read_requests,
    read_zsre,
)

COUNTERFACT = {
    "case_id": 7, "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is", "relation_id": "P103", "subject": "Danielle Darrieux",
        "target_new": {"str": "English", "id": "Q1860"}, "target_true": {"str": "French", "id": "Q150"},
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["Michel Rocard, a native speaker of"],
    "attribute_prompts": [], "generation_prompts": ["Danielle Darrieux was born in"],
}  # fmt: skip
ZSRE = {
    "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?", "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"], "loc": "nq question: who played desmond doss father?",
    "loc_ans": "Hugo Weaving", "cond": "a >> b",
}  # fmt: skip


def test_counterfact_and_zsre(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps([COUNTERFACT] * 3))
    found = read_counterfact(path)
    assert len(found) == 3
    assert found == read_requests(path)
    assert len(read_requests(path, limit=2)) == 2
    one = found[0]
    assert one.text == "The mother tongue of Danielle Darrieux is"
    assert (one.target_new, one.target_true, one.case, one.relation) == ("English", "French", "7", "P103")
    assert one.neighbours == (Probe("Michel Rocard, a native speaker of", "French", "English"),)
    path.write_text(json.dumps([ZSRE]))
    (one,) = read_zsre(path)
    assert read_requests(path) == [one]
    assert one.prompt == "What university did {} attend?"
    assert one.target_new == "Illinois Institute of Technology"
    assert one.neighbours[0].prompt == "who played desmond doss father?"
    plain = {"prompt": "Tom lives in", "subject": "Tom", "target_new": "Rome", "paraphrases": ["The home of Tom is"]}
    path.write_text(json.dumps([plain]))
    assert read_requests(path)[0].prompt == "{} lives in"


@pytest.mark.parametrize(
    "text", ["{", "{}", "[1]", '[{"requested_rewrite": {}}]', '[{"src": "a", "answers": []}]', "[{}]"]
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises((DataError, EditError)):
        read_requests(path)
    with pytest.raises(DataError):
        read_requests(tmp_path / "absent.json")


def test_nonsense_is_refused():
    with pytest.raises(EditError, match="does not hold the subject"):
        EditRequest.of_text("The capital of France is", "Spain", "Madrid")
    with pytest.raises(EditError, match="does not hold the subject"):
        EditRequest.of_text("Rome is Rome", "Rome", "Paris")
    with pytest.raises(EditError, match="already has"):
        EditRequest("{} is in", "Rome", "Italy", "Italy ")
    with pytest.raises(EditError, match="needs a subject"):
        EditRequest("{} is in", " ", "Italy")
    model = subject("gpt2")
    with pytest.raises(EditError, match="asked to be both"):
        check_requests(model, [FACTS[0], EditRequest(FACTS[0].prompt, FACTS[0].subject, "Paul")])
    check_requests(model, FACTS)


def test_the_subject_s_last_token_is_found_in_every_context():
    model = subject("gpt2")
    for template in ("{}", "The sun was out. {}"):
        one = encode_labelled(model, EditRequest("The friend of {} is called", "Mary Smith", "John").labelled(template))
        first, end = one.spans["subject"]
        assert model.tokenizer.decode(one.ids[first:end]).strip() == "Mary Smith"
        assert model.tokenizer.decode(one.ids[end:]) == " is called"
