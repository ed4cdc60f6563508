"""`tomoscope trace` and `edit` on the embedded model: a fact changed, saved, applied again; nonsense refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tomoscope.cli.main import app
from tomoscope.model import EMBEDDED, open_model
from tomoscope.phantoms.world import shipped_world
from tomoscope.treat import load_treatment

PERSON = shipped_world().people[7]
BORN = shipped_world().answer("born", PERSON)
NEW = next(city for city in shipped_world().answers("born") if city != BORN)
FACT = ("--prompt", f"{PERSON} was born in", "--subject", PERSON)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_trace():
    found = json.loads(call("trace", *FACT, "--draws", 3, "--json").stdout)
    assert found["answer"].strip() == BORN
    assert len(found["effect"]) == len(found["tokens"])
    assert found["probability"] > found["under_noise"]
    assert found["effect"][found["peak"]["token"]][found["peak"]["layer"]] == pytest.approx(
        max(map(max, found["effect"])), abs=1e-5
    )
    shown = call("trace", *FACT, "--draws", 2, "--kind", "attn", "--window", 2).stdout
    assert "regained by layer" in shown
    assert "most comes back" in shown


def test_edit_is_saved_and_applied_again(tmp_path):
    path = tmp_path / "fact.safetensors"
    found = json.loads(call("edit", *FACT, "--target", NEW, "--tokens", 3000, "-o", path, "--json").stdout)
    assert found["answers"][0]["before"] == BORN
    assert found["answers"][0]["after"] == NEW
    assert found["place"] == "where tracing points"
    assert "paraphrase" in found["not_measured"]
    assert {score["protocol"] != "" for score in found["scores"]} == {True}
    subject = open_model(EMBEDDED)
    with load_treatment(path).applied(subject):
        token = int(subject.last_logits([f"{PERSON} was born in"]).argmax())
    assert subject.tokenizer.decode([token]).strip() == NEW


def test_edit_of_a_file_by_other_methods(tmp_path):
    path = tmp_path / "facts.json"
    rows = []
    for person in shipped_world().people[20:23]:
        old = shipped_world().answer("plays", person)
        new = next(one for one in shipped_world().answers("plays") if one != old)
        rows.append(
            {"prompt": "{} plays the", "subject": person, "target_new": new, "target_true": old, "case": person,
             "paraphrases": [f"{person} loves to play the"],
             "neighbours": [{"prompt": "The capital of France is", "right": "Paris", "wrong": new}]}
        )  # fmt: skip
    path.write_text(json.dumps(rows))
    shown = call("edit", "--requests", path, "--method", "memit", "--layer", 5, "--at", "last", "--tokens", 3000).stdout
    for word in ("MEMIT, 3 facts, layer 5", "harmonic", "paraphrase exact", "reasoning: not measured, because"):
        assert word in shown
    found = json.loads(call("edit", "--requests", path, "--method", "ft", "--layer", 5, "--limit", 2, "--json").stdout)
    assert found["facts"] == 2
    assert found["second_moments"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "The sky is", "--subject", PERSON, "--target", NEW), "does not hold the subject"),
        ((*FACT, "--target", BORN), "already continues"),
        ((*FACT, "--target", NEW, "--layer", 77), "no layer 77"),
        ((*FACT, "--target", NEW, "--method", "romee"), "no method"),
        ((*FACT, "--target", NEW, "--at", "middle", "--layer", 1), "can't be written"),
        ((*FACT, "--target", NEW, "--layer", 1, "--layer", 2), "one layer"),
        ((), "one fact, or a file"),
        (("--requests", "absent.json"), "can't be read"),
    ],
)
def test_nonsense_is_refused_with_the_reason(arguments, said):
    result = call("edit", *arguments, "--tokens", 3000, "--json", code=2)
    assert said in json.loads(result.stdout)["error"]["what"]
