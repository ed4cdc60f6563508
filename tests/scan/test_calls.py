"""A whole scan as one call, with exams that need no model."""

from __future__ import annotations

import pytest

from tests.dummies import DummySubject, make_exam
from tomoscope.errors import LedgerError, ProtocolError
from tomoscope.exams import EXAMS, register
from tomoscope.scan import load_report, parse_protocol, scan_model

PROTOCOL = parse_protocol('name = "dummy"\nseed = 3\n[[exam]]\nname = "dummy.heads"\n', where="here")


@pytest.fixture(autouse=True)
def exam():
    yield register(make_exam())
    EXAMS.unregister("dummy.heads")


def test_it_runs_writes_the_report_and_is_read_back(tmp_path):
    ledger = scan_model(DummySubject(), tmp_path / "run", protocol=PROTOCOL, options={"dummy.heads": {"prompts": 30}})
    again = load_report(tmp_path / "run")
    assert again.findings() == ledger.findings()
    assert again.manifest.status == "finished"
    assert again.manifest.seed == 3
    assert "Head 3 stands out" in (tmp_path / "run" / "report.html").read_text()
    assert again.findings()[0].reproduce.startswith("tomoscope scan --exam dummy.heads --seed 3")


def test_a_protocol_may_be_a_file_and_the_seed_another(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[[exam]]\nname = "dummy.*"\n')
    ledger = scan_model(DummySubject(), tmp_path / "run", protocol=path, seed=7)
    assert (ledger.manifest.protocol["name"], ledger.manifest.seed) == ("mine", 7)


def test_the_model_s_place_stands_in_the_command_quoted(tmp_path):
    subject = DummySubject()
    subject.source = "my models/one"
    (finding,) = scan_model(subject, tmp_path / "run", protocol=PROTOCOL).findings()
    assert finding.reproduce.startswith("tomoscope scan 'my models/one' --exam dummy.heads")


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    for wrong in ({"protocol": "quik"}, {"protocol": PROTOCOL, "only": ["dummy.head"]}):
        with pytest.raises(ProtocolError):
            scan_model(DummySubject(), tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()
    with pytest.raises(LedgerError, match="no run"):
        load_report(tmp_path / "run")


def test_a_budget_leaves_the_rest_unmeasured(tmp_path):
    (finding,) = scan_model(DummySubject(), tmp_path / "run", protocol=PROTOCOL, budget_seconds=1e-9).findings()
    assert finding.verdict == "not measured"
    assert "budget" in finding.reason
