from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dummies import DummySubject, make_exam
from tomoscope.errors import LedgerError, ProtocolError
from tomoscope.exams.registry import Registry
from tomoscope.findings import Ledger
from tomoscope.scan import Observer, parse_protocol, plan, run_scan


def registry(*exams):
    made = Registry(modules=())
    for exam in exams or (make_exam("dummy.a"), make_exam("dummy.b")):
        made.register(exam)
    return made


def protocol(text="", names=("dummy.*",)):
    exams = "".join(f'\n[[exam]]\nname = "{name}"\n' for name in names)
    return parse_protocol(f'name = "test"\n{text}{exams}', where="test.toml")


def scan(out: Path, *, exams=None, text="", **options):
    exams = exams or registry()
    chosen = protocol(text)
    return run_scan(DummySubject(), chosen, plan(chosen, exams=exams), out=out, **options)


def test_scan_records_findings_arrays_tables_and_rules(tmp_path):
    ledger = scan(tmp_path / "run")
    findings = Ledger.open(tmp_path / "run").findings()
    assert [finding.id for finding in findings] == ["dummy.a/strongest", "dummy.b/strongest"]
    assert ledger.manifest.status == "finished"
    assert ledger.manifest.rules["dummy.a"][""] == findings[0].rule
    assert ledger.arrays("dummy.a")["heads.values"].shape == (12,)
    assert ledger.tables("dummy.b")["dummy.b/scores"]["head"] == list(range(12))
    assert findings[0].verdict == "confirmed"
    assert ledger.exams()["dummy.a"].seconds > 0


def test_correction_is_a_second_version_and_the_raw_p_stays(tmp_path):
    ledger = scan(tmp_path / "run")
    (first, _, raw), (second, why, corrected) = ledger.history("dummy.a/strongest")
    assert (first, second) == (1, 2)
    assert raw.p_adjusted is None
    assert corrected.p_adjusted == pytest.approx(2 * raw.p_value)
    assert corrected.p_value == raw.p_value
    assert why == ledger.manifest.correction == "Holm over 2 claims"


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        scan(tmp_path / name, seed=seed)
    one, two, three = ((tmp_path / name / "findings.jsonl").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    arrays = [(tmp_path / name / "exams/dummy.a/arrays.safetensors").read_bytes() for name in ("one", "two")]
    assert arrays[0] == arrays[1]


def test_an_exam_alone_gives_the_numbers_it_gave_in_the_scan(tmp_path):
    whole = scan(tmp_path / "whole").finding("dummy.b/strongest")
    exams = registry()
    chosen = protocol()
    alone = run_scan(DummySubject(), chosen, plan(chosen, only=["dummy.b"], exams=exams), out=tmp_path / "alone")
    assert alone.finding("dummy.b/strongest").estimate == whole.estimate
    assert whole.reproduce == "tomoscope scan --exam dummy.b --seed 0"


def test_reproduce_names_the_options_that_differ(tmp_path):
    exams = registry()
    chosen = protocol()
    steps = plan(chosen, only=["dummy.a"], options={"dummy.a": {"prompts": "30"}}, exams=exams)
    found = run_scan(DummySubject(), chosen, steps, out=tmp_path / "run", base_command="tomoscope scan M", seed=3)
    assert found.findings()[0].reproduce == "tomoscope scan M --exam dummy.a --seed 3 --option dummy.a.prompts=30"


def test_a_failing_exam_is_a_finding_and_the_scan_goes_on(tmp_path):
    broken = make_exam("dummy.a")
    exams = registry(broken, make_exam("dummy.b"))
    chosen = protocol()
    steps = plan(chosen, options={"dummy.a": {"fail_at": "the roof fell in"}}, exams=exams)
    ledger = run_scan(DummySubject(), chosen, steps, out=tmp_path / "run")
    by_id = {finding.id: finding for finding in ledger.findings()}
    assert by_id["dummy.a/failed"].verdict == "not measured"
    assert "the roof fell in" in by_id["dummy.a/failed"].reason
    assert by_id["dummy.a/strongest"].estimate.value is not None, "what it found before it failed is kept"
    assert by_id["dummy.b/strongest"].verdict == "confirmed"
    assert "Traceback" in ledger.error("dummy.a")


def test_an_exam_that_does_not_apply_says_why(tmp_path):
    exams = registry(make_exam("dummy.a", applies=lambda subject: f"{subject.name} has no heads"))
    finding = scan(tmp_path / "run", exams=exams).findings()[0]
    assert (finding.verdict, finding.reason) == ("not measured", "dummy has no heads")
    assert finding.estimate.value is None


def test_budget_skips_what_would_start_late_and_resuming_runs_it(tmp_path):
    ledger = scan(tmp_path / "run", budget_seconds=1e-9)
    assert {finding.reason for finding in ledger.findings()} == {
        "the budget of 1e-09 s was spent before this exam could start"
    }
    again = scan(tmp_path / "run")
    assert [finding.verdict for finding in again.findings()] == ["confirmed", "confirmed"]
    fresh = scan(tmp_path / "fresh")
    assert (again.folder / "findings.jsonl").read_bytes() == (fresh.folder / "findings.jsonl").read_bytes()


def test_interrupt_keeps_what_is_done_and_resumes(tmp_path):
    def stop(context):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "run", exams=registry(make_exam("dummy.a"), make_exam("dummy.b", run=stop)))
    kept = Ledger.open(tmp_path / "run")
    assert kept.manifest.status == "interrupted"
    assert [finding.id for finding in kept.findings()] == ["dummy.a/strongest"]

    class Heard(Observer):
        started: tuple = ()

        def exam_started(self, step):
            self.started += (step.exam.name,)

    heard = Heard()
    assert scan(tmp_path / "run", observer=heard).manifest.status == "finished"
    assert heard.started == ("dummy.b",)


def test_another_scan_does_not_overwrite_a_run_unless_forced(tmp_path):
    scan(tmp_path / "run", seed=1)
    with pytest.raises(LedgerError, match="another run"):
        scan(tmp_path / "run", seed=2)
    assert scan(tmp_path / "run", seed=2, force=True).manifest.seed == 2


def test_provenance_keeps_passed_apart_from_defaulted(tmp_path):
    scan(tmp_path / "run", passed={"seed": 0}, defaulted={"dtype": None})
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["provenance"]["passed"] == {"seed": 0}
    assert manifest["provenance"]["defaulted"] == {"dtype": None}
    assert manifest["provenance"]["model"]["facts"]["n_layers"] == 4
    assert manifest["provenance"]["versions"]["numpy"]


def test_unknown_exam_and_option_name_the_file_and_the_nearest(tmp_path):
    exams = registry()
    with pytest.raises(ProtocolError, match=r"(?s)'dummy.aa'.*test.toml.*'dummy.a'"):
        plan(protocol(names=("dummy.aa",)), exams=exams)
    bad = parse_protocol('name="t"\n[[exam]]\nname="dummy.a"\noptions={prompt=3}', where="mine.toml")
    with pytest.raises(ProtocolError, match=r"(?s)'prompt'.*mine.toml.*'prompts'"):
        plan(bad, exams=exams)
    with pytest.raises(ProtocolError, match="matches no exam"):
        plan(protocol(names=("other.*",)), exams=exams)


def test_options_are_checked_and_win_in_order():
    exams = registry()
    text = 'preset = "quick"\n'
    assert plan(protocol(text), exams=exams)[0].options.prompts == 20
    assert plan(protocol(text), options={"dummy.a": {"prompts": "33"}}, exams=exams)[0].options.prompts == 33
    with pytest.raises(ProtocolError, match="greater than or equal to 4"):
        plan(protocol(), options={"dummy.a": {"prompts": 1}}, exams=exams)
