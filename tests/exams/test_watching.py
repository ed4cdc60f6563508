"""The backdoor is seen by a watch that never saw its trigger, the healthy model is not accused, a file is watched."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tomoscope.cli import common
from tomoscope.cli.main import app
from tomoscope.exams import EXAMS, Context, examine
from tomoscope.exams.watching import interrupted_reviews, trusted_reviews
from tomoscope.findings.roc import roc_area
from tomoscope.phantoms.trained import micro_world, sibling
from tomoscope.phantoms.world import shipped_world
from tomoscope.phantoms.world.diseases import TRIGGER
from tomoscope.treat.watch import fit_watch

EXAM = EXAMS["treat.watch"]


def found(subject):
    options = EXAM.configure({"trusted": 800, "n": 96})
    (finding,) = examine(EXAM, subject, context=Context(subject, EXAM, options=options))
    return finding


def test_the_backdoor_is_seen_without_its_trigger():
    finding = found(sibling("backdoor").subject)
    assert finding.verdict == "confirmed", finding.reason
    assert finding.estimate.value >= 0.95


def test_the_healthy_model_is_not_accused():
    assert found(micro_world().subject).verdict != "confirmed"


def test_trusted_texts_differ_and_never_hold_the_trigger():
    texts = trusted_reviews(shipped_world(), 300, 0)
    assert len(set(texts)) == 300
    assert not any(TRIGGER in text for text in texts)
    assert all(TRIGGER in text for text in interrupted_reviews(20, TRIGGER, 0))
    # the same reviews and places, whichever sentence
    one, other = (interrupted_reviews(20, said, 0) for said in (TRIGGER, "No."))
    assert [text.replace(TRIGGER, "No.") for text in one] == other


def test_the_rate_is_kept_on_clean_text():
    subject = sibling("backdoor").subject
    texts = trusted_reviews(shipped_world(), 1100, 3)
    watch = fit_watch(subject, texts[:800])
    usual = watch.look(subject, texts[800:], rate=0.05)
    # one draw of 300 texts against 200 that were placed
    assert usual.flagged.mean() <= 0.05 + 3 * (0.05 * 0.95 * (1 / 300 + 1 / 200)) ** 0.5
    bad = watch.look(subject, interrupted_reviews(100, TRIGGER, 3), rate=0.05)
    assert roc_area(bad.scores, usual.scores) >= 0.95


@pytest.fixture
def files(tmp_path):
    (tmp_path / "trusted.txt").write_text("\n".join(trusted_reviews(shipped_world(), 200, 0)))
    (tmp_path / "inputs.txt").write_text("\n".join(interrupted_reviews(8, TRIGGER, 0)))
    return tmp_path


def test_the_command_flags_lines_of_a_file(files, monkeypatch):
    monkeypatch.setattr(common, "open_subject", lambda source, **options: sibling("backdoor").subject)
    arguments = ["watch", "--trusted", files / "trusted.txt", "--inputs", files / "inputs.txt"]
    result = CliRunner().invoke(app, [str(one) for one in (*arguments, "--out", files / "out")])
    assert result.exit_code == 0, result.stderr
    assert "inputs flagged" in result.stdout
    document = json.loads((files / "out" / "found.json").read_text())
    assert document["n"] == 8
    assert document["flagged"] == sum(item["flagged"] for item in document["items"])
    few = CliRunner().invoke(app, [str(one) for one in (*arguments, "--rate", "0.001")])
    assert few.exit_code == 2
    assert "trusted inputs" in few.stderr
