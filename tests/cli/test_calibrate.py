from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.exams.calibration.world import always, oracle, phantom, thing_exam
from tomoscope.cli.main import app
from tomoscope.exams import EXAMS, register
from tomoscope.findings import CalibrationTable
from tomoscope.phantoms import PHANTOMS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def things(monkeypatch):
    register(thing_exam(oracle, "test.good"))
    register(thing_exam(always, "test.bad"))
    one = phantom()
    PHANTOMS.register(one)
    yield
    for name in ("test.good", "test.bad"):
        EXAMS.unregister(name)
    PHANTOMS._load().pop(one.name)


def test_a_calibration_from_the_command_line(things, tmp_path):
    result = run(
        "calibrate", "--exams", "test.good,test.bad", "--phantoms", "thing", "--seeds", 9, "-o", tmp_path / "c"
    )
    assert result.exit_code == 0, result.output
    assert "9/9 [0.70, 1.00]" in result.stdout
    assert "0/9 [0.00, 0.30]" in result.stdout
    assert "test.bad: confirms what is not there more often than 5 %" in result.stdout
    assert "test.good: " not in result.stdout
    table = CalibrationTable.read(tmp_path / "c/calibration.json")
    assert table.row("test.good").sensitivity.value == 1
    again = run("calibrate", "--exams", "test.*", "--phantoms", "thing", "--seeds", 9, "-o", tmp_path / "c", "--json")
    assert "Resuming: 36 of 36 are done." in again.stderr
    assert json.loads(again.stdout)["rows"] == table.model_dump(mode="json")["rows"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exams", "test.goof"], ["test.goof", "test.good"]),
        (["--phantoms", "thong"], ["thong", "thing"]),
        (["--preset", "qick"], ["qick", "quick"]),
        (["--phantoms", "thing", "--out", "file"], ["--out"]),
    ],
)
def test_mistakes_are_told_with_a_remedy_before_any_work(things, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    result = run("calibrate", "--exams", "test.good", *arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_scan_shows_the_calibration_of_an_exam_of_ones_own(things, tmp_path, monkeypatch):
    import dataclasses

    from tests.dummies import DummySubject
    from tomoscope.cli import common
    from tomoscope.exams.calibration import calibrate

    monkeypatch.setattr(common, "open_subject", lambda source, **options: DummySubject(name="with all"))
    exam = EXAMS["test.bad"]
    table = calibrate(tmp_path / "c", exams=[exam], phantoms=["thing"], seeds=9)
    EXAMS.unregister("test.bad")
    register(dataclasses.replace(exam, calibration=table))
    done = run("scan", "M", "--exam", "test.bad", "-p", "quick", "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    said = "calibrated: finds 9 of 9 planted [0.70, 1.00], silent on 0 of 9 nulls [0.00, 0.30]; ROC area 0.50"
    shown = " ".join(run("show", tmp_path / "run").stdout.split())
    assert said in shown
    assert "It confirms what is not there more often than 5 %; it is not shown to be better than chance" in shown
    assert "calibrated badly" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    EXAMS.unregister("test.bad")
    register(dataclasses.replace(exam, calibration=table, options=exam.options, rule={"": exam.rule, "new": exam.rule}))
    run("scan", "M", "--exam", "test.bad", "-p", "quick", "-o", tmp_path / "later")
    document = json.loads(run("show", tmp_path / "later", "--json").stdout)
    assert document["findings"][0]["calibration"]["status"] == "stale"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, number, code):
    source = f"""
import os, sys, time
from tests.exams.calibration.world import oracle, phantom, thing_exam
from tomoscope.cli.main import main
from tomoscope.exams import register
from tomoscope.phantoms import PHANTOMS
def slow(subject, rng):
    if subject.name.endswith("1") and "SLOW" in os.environ:
        print("working", file=sys.stderr, flush=True)
        time.sleep(60)
    return oracle(subject, rng)
register(thing_exam(slow, "test.slow"))
PHANTOMS.register(phantom())
sys.argv = ["tomoscope", "calibrate", "--exams", "test.slow", "--phantoms", "thing", "--seeds", "3",
            "-o", {str(tmp_path / "c")!r}]
main()
"""
    command = [sys.executable, "-c", source]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"SLOW": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while "working" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(number)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == code
    assert "Traceback" not in said
    assert "To go on: tomoscope calibrate" in " ".join(said.split())
    assert len((tmp_path / "c/lines.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "c/.lock").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "Resuming: 2 of 6 are done." in done.stderr
    assert CalibrationTable.read(tmp_path / "c/calibration.json").row("test.slow").planted.right == 3
