"""The commands of concepts on files: the embedded model's own concepts, and files that are wrong."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from tomoscope.cli.main import app
from tomoscope.exams.concept_data import sentiment, truth
from tomoscope.exams.lying import world_items
from tomoscope.model import EMBEDDED


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    items = sentiment(80, 0)
    rows = [{"review": text, "good": int(label)} for text, label in zip(items.texts, items.labels, strict=True)]
    return table(tmp_path_factory.mktemp("data") / "reviews.csv", rows)


def test_probe_steer_and_erase(reviews, tmp_path):
    common = ("--text", "review", "--label", "good", "--json")
    found = call(
        "probe", "--data", reviews, *common, "--site", "layer.4.resid_post", "--out", tmp_path / "probe"
    ).stdout
    document = json.loads(found)
    assert document["best"] == "layer.4.resid_post"
    assert document["accuracy"]["low"] > 0.8
    assert document["p_value"] < 0.01
    assert document["selectivity"]["missing"]
    assert next(iter(document["distractors"])) == "the label itself"
    assert json.loads((tmp_path / "probe" / "found.json").read_text()) == document

    erased = json.loads(call("erase", "--data", reviews, "--site", "layer.4.resid_post", *common).stdout)
    assert erased["rank"] == 1
    probes = erased["probes"]
    assert probes["layer.4.resid_post before"]["linear"]["value"] > 0.8

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(text for text, _ in zip(sentiment(16, 5).texts, range(16), strict=True)))
    direction = tmp_path / "probe" / "direction.safetensors"
    common = (
        "steer",
        "--direction",
        direction,
        "--prompts",
        prompts,
        "--answers",
        "positive,negative",
        "--doses",
        "1,2",
    )
    steered = json.loads(call(*common, "--most-loss", "5", "--json").stdout)
    assert [row["dose"] for row in steered["curve"]] == [0, 1, 2]
    assert steered["curve"][1]["effect"] > steered["curve"][0]["effect"]
    assert "dose" in call(*common, "--most-loss", "5").stdout
    assert "no dose" in call(*common, "--most-loss=-9", "--export", tmp_path / "x.gguf", code=2).output.lower()


def test_truth(tmp_path):
    items = truth(60, 0)
    rows = [
        {"statement": text.removeprefix("Claim: ").removesuffix(" This claim is"), "label": int(label), "who": who}
        for text, label, who in zip(items.texts, items.labels, items.clusters, strict=True)
    ]
    path = table(tmp_path / "claims.csv", rows)
    words = ("truth", "--data", path, "--cluster", "who", "--restarts", 2, "--steps", 20)
    document = json.loads(call(*words, "--json", "--out", tmp_path / "truth").stdout)
    first = document["templates"][0]
    assert first["zero-shot"]["value"] > 0.7
    assert first["contextually calibrated zero-shot"]["n"] == first["zero-shot"]["n"]
    assert set(first["methods"]) == {"CCS paper", "CCS reference", "CCS elk", "CRC-TPC", "LAT"}
    for got in first["methods"].values():
        assert got["folded accuracy"] >= 0.5
        assert got["orientation"] == "labelled anchors"
    assert (tmp_path / "truth" / "direction.safetensors").exists()


def test_lies(tmp_path):
    rows = [
        {"prompt": one.neutral, "right": one.first.strip(), "wrong": one.second.strip()} for one in world_items(16, 0)
    ]
    path = table(tmp_path / "facts.csv", rows)
    document = json.loads(call("lies", "--statements", path, "--json").stdout)
    assert document["n"] == 16
    assert document["truth_direction"]["shares"]["right on unseen sources"]["n"] == 16
    assert document["shares"]["believes the truth"]["value"] > 0.8
    assert "answers against the belief" in call("lies", "--statements", path).stdout


def test_lies_by_an_honest_model_and_statements_of_ones_own(tmp_path):
    items = world_items(16, 0, kind="opinion")
    path = table(tmp_path / "facts.csv", [
        {"prompt": one.neutral, "right": one.first.strip(), "wrong": one.second.strip()} for one in items
    ])  # fmt: skip
    known = table(tmp_path / "known.csv", [
        {"statement": text, "label": right, "topic": one.topic, "sign": 1}
        for one in world_items(24, 3, kind="opinion")
        for text, right in zip(one.statements, ("true", "false"), strict=True)
    ])  # fmt: skip
    embedded = str(EMBEDDED)
    words = ("lies", embedded, "--statements", path, "--reference", embedded, "--truth-data", known)
    document = json.loads(call(*words, "--polarity", "sign", "--json").stdout)
    assert document["threshold_from"] == "an honest model"
    assert len(document["truth_direction"]["sites"]) == 1
    assert "no polarity" in " ".join(call(*words, "--polarity", "topic", code=2).output.split())
    assert "no column" in " ".join(call(*words, "--polarity", "sgin", code=2).output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("probe", "--data", "none.csv"), "can't be read"),
        (("probe", "--data", "{reviews}", "--text", "review", "--label", "god"), "Did you mean 'good'"),
        (("probe", "--data", "{reviews}"), "no column with a usual name"),
        (("probe", "--data", "{reviews}", "--text", "review", "--label", "good", "--method", "svm"), "no probe method"),
        (("erase", "--data", "{reviews}", "--text", "review", "--label", "good", "--site", "layer.9.resid_post"),
         "layer 9"),
        (("lies", "--statements", "none.csv"), "can't be read"),
        (("steer", "--direction", "none", "--prompts", "x", "--answers", "a,b"), "no direction"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(arguments, said, reviews):
    output = call(*(one.replace("{reviews}", str(reviews)) for one in arguments), code=2).output
    assert said in " ".join(output.split())
