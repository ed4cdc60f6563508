"""Every example runs, on any decoder, and gives what it says it gives."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from pathlib import Path

import pytest

from tests import tiny
from tomoscope.exams import EXAMS
from tomoscope.model import EMBEDDED

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / request.param, family=request.param)


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_read_and_edit(model):
    moved = load("read_and_edit").main(model)
    assert moved.pop("nothing") == 0.0
    assert all(value > 0 for value in moved.values())


def test_logit_lens(model, capsys):
    reading = load("logit_lens").main(model)
    assert len(reading.sites) == tiny.LAYERS + 1
    assert float(reading.kl[-1, 0]) == pytest.approx(0.0, abs=1e-5)
    assert int(reading.answer_rank[-1, 0]) == 0
    assert "layer.2.resid_post" in capsys.readouterr().out


def test_patch_ioi(model):
    heads = load("patch_ioi").main(model, 8)
    assert tuple(heads.values.shape) == (tiny.LAYERS, 1, 4, 8)
    assert bool(heads.values.isfinite().all())


def test_find_induction_heads(model):
    roles = load("find_induction_heads").main(model)
    assert set(roles) == {"previous_token", "duplicate_token", "induction"}
    assert all(0 <= float(scores.values.min()) <= float(scores.values.max()) <= 1 for scores in roles.values())


def test_steer_generation(model):
    written = load("steer_generation").main(model, 20.0)
    assert len(set(written.values())) == 3


def test_attribute_answer(model):
    parts = load("attribute_answer").main(model)
    assert float(parts.values.sum(0)[0]) == pytest.approx(float(parts.total[0]), abs=1e-4)


def test_trace_a_fact(model):
    traces = load("trace_a_fact").main(model)
    hidden = traces["hidden"]
    assert tuple(hidden.effect.shape) == (len(hidden.tokens), tiny.LAYERS)
    # restoring the last token after the last block gives the clean answer back
    assert float(hidden.values[-1, -1].mean()) == pytest.approx(hidden.clean, abs=1e-5)


def test_own_exam(model, tmp_path):
    module = load("own_exam")
    EXAMS.unregister("own.previous_token")
    try:
        ledger = module.main(model, tmp_path / "run")
    finally:
        EXAMS.unregister("own.previous_token")
    assert {finding.exam for finding in ledger.findings()} == {"own.previous_token", "observe.abilities"}
    assert all(record.status == "done" for record in ledger.exams().values())
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000
    mine = ledger.finding("own.previous_token/head")
    assert mine.verdict != "not measured"
    assert math.isfinite(mine.estimate.value)


def test_every_example_has_a_test_a_main_and_its_own_words():
    assert len(SCRIPTS) >= 8
    for name in SCRIPTS:
        assert f"test_{name}" in globals(), f"examples/{name}.py has no test"
        module = load(name)
        assert module.__doc__
        assert module.main.__doc__
        assert f"python examples/{name}.py" in module.__doc__
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


@pytest.mark.skipif(not (EMBEDDED / "config.json").is_file(), reason="the embedded model is not there")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_on_the_embedded_model_without_arguments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        load(name).main()
    finally:
        EXAMS.unregister("own.previous_token")
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
