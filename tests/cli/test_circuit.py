"""`tomoscope circuit`: a task and a file of pairs, every method, what it writes, and mistakes told in words."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.exams.world import whole_words
from tests.zoo import ZOO
from tomoscope.circuits import Circuit
from tomoscope.circuits.formats import read_eap_ig
from tomoscope.cli import common
from tomoscope.cli.main import app
from tomoscope.exams.circuit_run import METHODS
from tomoscope.model import open_model


@pytest.fixture(scope="module")
def subject():
    tokenizer = whole_words()
    return open_model(ZOO["llama"].build(vocab=len(tokenizer)), tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def opened(monkeypatch, subject):
    monkeypatch.setattr(common, "open_subject", lambda source, **options: subject)


def run(*arguments):
    return CliRunner().invoke(app, ["circuit", *(str(argument) for argument in arguments)])


SMALL = ("--n", 8, "--draws", 4, "--steps", 1)


def test_a_task_from_the_shell(tmp_path, subject):
    result = run("--task", "facts", *SMALL, "--out", tmp_path / "found")
    assert result.exit_code == 0, result.output
    for words in ("share of the behaviour kept", "other heads", "untrained scores", "CMD", "component: edges", "<-"):
        assert words in result.stdout, words
    from tomoscope.circuits import Graph

    graph = Graph.of(subject)
    saved = Circuit.load(tmp_path / "found" / "circuit.json")
    assert saved.graph == graph
    assert read_eap_ig(tmp_path / "found" / "circuit.eap-ig.json", graph) == saved
    proof = json.loads((tmp_path / "found" / "proof.json").read_text())
    assert proof["circuit"]["n_edges"] == saved.n_edges
    assert proof["pairs"] == {"found": 4, "measured": 4}
    assert len(proof["curve"]["circuit"]["share"]) == 10


def test_json_is_one_document():
    result = run("--task", "facts", *SMALL, "--edges", 12, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["task"] == "facts"
    assert document["circuit"]["how"]["asked"] == 12
    assert set(document["areas"]) == {"cpr", "cmd", "log_cpr", "log_cmd"}
    assert json.loads(run("--task", "facts", *SMALL, "--edges", 12, "--json").stdout) == document


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    more = ["--threshold", 1e-3, "--metric", "kl"] if method == "ACDC" else []
    result = run("--task", "facts", *SMALL, "--method", method, "--json", *more)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["circuit"]["how"]["method"].replace(" ", "-") == method.replace(" ", "-")
    assert ("untrained scores" in document["share"]) is (method not in ("ACDC", "edge-pruning"))


def test_pairs_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    answers = ("Paris", "Rome", "Tokyo", "Madrid")
    names = ("France", "Italy", "Japan", "Spain")
    lines = [
        {"clean": f"The capital of {one} is", "corrupted": f"The capital of {two} is", "answers": [f" {right}"],
         "wrong_answers": [f" {wrong}"]}
        for one, right in zip(names, answers, strict=True) for two, wrong in zip(names, answers, strict=True)
        if one != two
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines))
    result = run("--pairs", path, "--draws", 4, "--steps", 1, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["task"] == "mine"
    assert document["metric"] == "logit difference"
    assert sum(document["pairs"].values()) == len(lines)
    for line in lines:
        del line["wrong_answers"]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    result = run("--pairs", path, "--draws", 4, "--steps", 1, "--json")
    assert json.loads(result.stdout)["metric"] == "probability"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--task or --pairs"),
        (("--task", "facts", "--pairs", "x.jsonl"), "one of them"),
        (("--task", "fact"), "'facts'"),
        (("--pairs", "nowhere.jsonl"), "can't be read"),
        (("--task", "facts", "--method", "EAB"), "'EAP'"),
        (("--task", "facts", "--method", "ACDC"), "takes a threshold"),
        (("--task", "facts", "--threshold", 0.1), "no other method does"),
        (("--task", "facts", "--method", "ACDC", "--threshold", 0.1, "--edges", 3), "Leave --edges out"),
        (("--task", "facts", "--edges", 10**6), "the model's graph has"),
        (("--task", "facts", "--metric", "accuracy"), "no metric"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(arguments, words):
    result = run(*arguments, "--n", 8)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_no_file_of_pairs(tmp_path):
    path = tmp_path / "bad.jsonl"
    for text, words in (
        ("", "no pairs"), ("{", "not JSON"), ('{"clean": "a b"}', "corrupt"),
        ('{"clean": "a", "corrupted": "b", "answers": "c"}', "no list of texts"),
    ):  # fmt: skip
        path.write_text(text)
        result = run("--pairs", path)
        assert result.exit_code == 2, (text, result.output)
        assert words in result.output
    path.write_text('{"clean": "The capital", "corrupted": "The capital of", "answers": [" Paris"]}\n' * 4)
    result = run("--pairs", path)
    assert result.exit_code == 2
    (tmp_path / "taken").write_text("")
    result = run("--task", "facts", "--out", tmp_path / "taken")
    assert result.exit_code == 2
    assert "not a folder" in result.output
