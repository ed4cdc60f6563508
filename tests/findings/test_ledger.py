from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tomoscope.errors import LedgerError
from tomoscope.findings import Control, DataNote, Estimate, ExamRecord, Finding, Ledger, Manifest, Provenance, Rule
from tomoscope.findings import files as files_module
from tomoscope.findings import ledger as ledger_module
from tomoscope.findings.provenance import this_machine


def manifest(**changes):
    values = {"provenance": Provenance(machine=this_machine()), "protocol": {"name": "p", "exams": [{"name": "e"}]}}
    return Manifest(**(values | changes))


def finding(key="a", exam="e", **changes):
    values = {
        "id": f"{exam}/{key}", "exam": exam, "claim": "Heads «1» do \u202e things \x00.", "rule": Rule().sentence(),
        "estimate": Estimate(value=0.5, low=0.25, high=0.75, n=9), "chosen_on": DataNote(name="A", n=4),
        "controls": (Control(name="chance", estimate=Estimate(value=0.0)),), "measured_on": DataNote(name="B", n=5),
        "verdict": "confirmed", "reason": "so", "p_value": 0.01, "criterion": Rule(),
    }  # fmt: skip
    return Finding(**(values | changes))


def write(ledger, exam="e", n=2, **options):
    record = ExamRecord(exam=exam, status=options.pop("status", "done"))
    found = [finding(str(i), exam) for i in range(n)]
    ledger.record(record, found, **options)
    return found


def test_what_is_written_is_read_back(tmp_path):
    arrays = {"grid.values": np.arange(6, dtype=np.float32).reshape(2, 3)}
    tables = {"rows": {"token": ["a", "b"], "score": [0.5, None]}}
    with Ledger.create(tmp_path / "run", manifest()) as ledger:
        found = write(ledger, arrays=arrays, tables=tables)
    again = Ledger.open(tmp_path / "run")
    assert again.findings() == found
    assert again.finding("e/1") == found[1]
    np.testing.assert_array_equal(again.arrays("e")["grid.values"], arrays["grid.values"])
    assert again.tables() == {"e/rows": {"token": ["a", "b"], "score": [0.5, None]}}
    frame = again.dataframe()
    assert frame["value"] == [0.5, 0.5]
    assert frame["control"] == ["chance", "chance"]
    with pytest.raises(LedgerError, match=r"'e/10'.*'e/1'"):
        again.finding("e/10")
    assert not list((tmp_path / "run").glob("**/*.part"))


def test_a_reader_cannot_write(tmp_path):
    with Ledger.create(tmp_path / "run", manifest()) as ledger:
        write(ledger)
    with pytest.raises(LedgerError, match="reading only"):
        Ledger.open(tmp_path / "run").update(status="finished")


def test_a_revision_is_a_new_version(tmp_path):
    with Ledger.create(tmp_path / "run", manifest()) as ledger:
        first = write(ledger, n=1)[0]
        ledger.revise([first.model_copy(update={"p_adjusted": 0.02})], why="Holm over 2 claims")
        assert ledger.finding(first.id).p_adjusted == 0.02
        assert [(version, why) for version, why, _ in ledger.history(first.id)] == [(1, ""), (2, "Holm over 2 claims")]


def test_a_cut_off_last_line_is_left_out_and_a_broken_one_inside_is_an_error(tmp_path):
    run = tmp_path / "run"
    with Ledger.create(run, manifest()) as ledger:
        found = write(ledger)
    whole = (run / "findings.jsonl").read_bytes()
    (run / "findings.jsonl").write_bytes(whole + b'{"schema": 1, "finding": {"id": "e/9", "cla')
    assert Ledger.open(run).findings() == found
    with Ledger.create(run, manifest()):
        assert (run / "findings.jsonl").read_bytes() == whole, "resuming clears the torn line"
    (run / "findings.jsonl").write_bytes(b"rubbish\n" + whole)
    with pytest.raises(LedgerError, match="line 1 is not a finding"):
        Ledger.open(run).findings()


def test_lines_of_an_unfinished_exam_do_not_count(tmp_path):
    run = tmp_path / "run"
    with Ledger.create(run, manifest()) as ledger:
        write(ledger)
        write(ledger, exam="other")
    (run / "exams/other/done.json").unlink()
    assert [item.exam for item in Ledger.open(run).findings()] == ["e", "e"]
    with Ledger.create(run, manifest()) as ledger:
        assert b'"other' not in (run / "findings.jsonl").read_bytes()


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_resuming_runs_failed_and_skipped_exams_again(tmp_path, status):
    with Ledger.create(tmp_path / "run", manifest()) as ledger:
        write(ledger, status=status, error="trace")
        assert ledger.error("e") == "trace"
    with Ledger.create(tmp_path / "run", manifest()) as ledger:
        assert ledger.exams() == {}
        assert ledger.findings() == []


def test_places_that_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="is a file"):
        Ledger.create(tmp_path / "file", manifest())
    with pytest.raises(LedgerError, match="a file stands there"):
        Ledger.create(tmp_path / "file" / "below", manifest())
    with pytest.raises(LedgerError, match=r"could not be written|No permission"):
        Ledger.create("/proc/tomoscope-run", manifest())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(LedgerError, match="other files"):
            Ledger.create(tmp_path / "full", manifest(), force=force)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.tex"]
    with pytest.raises(LedgerError, match="no run"):
        Ledger.open(tmp_path / "nowhere")
    with pytest.raises(LedgerError, match="not a run"):
        Ledger.open(tmp_path / "full")


def test_a_place_is_checked_without_writing(tmp_path, monkeypatch):
    Ledger.check(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(LedgerError, match="a file stands there"):
            Ledger.check(place)
    monkeypatch.setattr(ledger_module.os, "access", lambda *arguments: False)
    with pytest.raises(LedgerError, match="No permission"):
        Ledger.check(tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(ledger_module, "FREE_BYTES", 1 << 62)
    with pytest.raises(LedgerError, match="MB are free"):
        Ledger.check(tmp_path)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ledger_module.os, "open", refuse)
    with pytest.raises(LedgerError, match="No permission"):
        Ledger.create(tmp_path / "run", manifest())


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "FREE_BYTES", 1 << 62)
    with pytest.raises(LedgerError, match="MB are free"):
        Ledger.create(tmp_path / "run", manifest())
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("call", ["write", "replace", "fsync"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    run = tmp_path / "run"
    with Ledger.create(run, manifest()) as ledger:
        found = write(ledger)
        before = (run / "findings.jsonl").read_bytes()
        real = getattr(os, call)

        def full(*arguments, **options):
            if call == "write":
                real(arguments[0], bytes(arguments[1])[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files_module.os, call, full)
        with pytest.raises(LedgerError, match="disk is full"):
            write(ledger, exam="late", arrays={"x": np.ones(3, np.float32)})
        monkeypatch.undo()
        assert (run / "findings.jsonl").read_bytes() == before
        assert ledger.findings() == found
        assert not list(run.glob("**/*.part"))
        write(ledger, exam="late")
        assert len(ledger.findings()) == 4


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user cannot mount a small disk; the test before this one simulates it")
    try:
        with pytest.raises(LedgerError, match="MB are free"):
            Ledger.create(small / "run", manifest())
        monkeypatch.setattr(ledger_module, "FREE_BYTES", 0)
        with Ledger.create(small / "run", manifest()) as ledger:
            found = write(ledger)
            with pytest.raises(LedgerError, match="disk is full"):
                write(ledger, exam="late", arrays={"x": np.random.default_rng(0).normal(size=100_000)})
            assert ledger.findings() == found
            assert not (small / "run/exams/late").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_writers_are_refused(tmp_path):
    with (
        Ledger.create(tmp_path / "run", manifest()),
        pytest.raises(LedgerError, match="Another process"),
    ):
        Ledger.create(tmp_path / "run", manifest())
    Ledger.create(tmp_path / "run", manifest()).close()


def test_another_schema_or_a_damaged_manifest_is_an_error(tmp_path):
    run = tmp_path / "run"
    Ledger.create(run, manifest()).close()
    data = json.loads((run / "manifest.json").read_text())
    for bad in (json.dumps(data | {"schema_version": 99}), json.dumps(data | {"seed": "x"}), "{", "[]"):
        (run / "manifest.json").write_text(bad)
        with pytest.raises(LedgerError):
            Ledger.open(run)


def test_names_cannot_leave_the_folder(tmp_path):
    with Ledger.create(tmp_path / "run", manifest()) as ledger, pytest.raises(LedgerError, match="cannot name"):
        write(ledger, exam="../../etc")


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from tests.dummies import DummySubject, make_exam, run_heads
from tomoscope.exams.registry import Registry
from tomoscope.scan import parse_protocol, plan, run_scan

def slow(context):
    print("third exam", flush=True)
    yield from run_heads(context)
    time.sleep({sleep})

exams = Registry(modules=())
for name in "abc":
    exams.register(make_exam("dummy." + name, **({{"run": slow}} if name == "c" else {{}})))
protocol = parse_protocol('name="t"\\n[[exam]]\\nname="*"', where="t")
run_scan(DummySubject(), protocol, plan(protocol, exams=exams), out={out!r})
print("finished")
"""


def test_a_scan_that_is_killed_resumes_to_the_same_record(tmp_path):
    root = Path(__file__).resolve().parents[2]

    def code(out, sleep):
        return KILLED.format(paths=[str(root / "src"), str(root)], sleep=sleep, out=str(tmp_path / out))

    process = subprocess.Popen([sys.executable, "-c", code("run", 60)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "third exam"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    killed = Ledger.open(tmp_path / "run")
    assert killed.manifest.status == "running"
    assert list(killed.exams()) == ["dummy.a", "dummy.b"]
    for out in ("run", "fresh"):
        done = subprocess.run([sys.executable, "-c", code(out, 0)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["third", "exam", "finished"]
    assert (tmp_path / "run/findings.jsonl").read_bytes() == (tmp_path / "fresh/findings.jsonl").read_bytes()
    assert Ledger.open(tmp_path / "run").manifest.status == "finished"
