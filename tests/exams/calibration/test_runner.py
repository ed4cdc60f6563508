"""A calibration's folder: resumed to the same file, refused where it holds another, errors before any work."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.dummies import DummySubject
from tests.exams.calibration.world import oracle, phantom, thing_exam
from tomoscope.errors import DataError, LedgerError, ProtocolError
from tomoscope.exams import EXAMS
from tomoscope.exams.calibration import Watcher, calibrate, plan_calibration
from tomoscope.findings.calibration import CalibrationTable
from tomoscope.phantoms import Card, Known, Phantom, Specimen


class Killed(BaseException):
    """As Ctrl-C: no exception that an exam's failure would be."""


def run(out, *, exams=None, phantoms=None, **options):
    exams = exams or [thing_exam(oracle, "test.a"), thing_exam(oracle, "test.b")]
    return calibrate(out, exams=exams, phantoms=phantoms or [phantom()], **({"seeds": 3} | options))


def content(folder):
    table = json.loads((folder / "calibration.json").read_text())
    table.pop("cost")
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.pop("peak_memory_bytes", None)
    return table, lines


@pytest.mark.parametrize("after", [1, 4, 7])
def test_killed_and_gone_on_with_gives_the_same_files(tmp_path, after):
    class Killer(Watcher):
        left = after

        def line(self, line, count):
            self.left -= 1
            if not self.left:
                raise Killed

    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", watcher=Killer())
    assert not (tmp_path / "killed/calibration.json").exists()
    with (tmp_path / "killed/lines.jsonl").open("a") as file:
        file.write('{"case": "thing/planted/2", "exam": "te')  # what a crash leaves
    heard = []

    class Counter(Watcher):
        def started(self, total, done):
            heard.append((total, done))

    run(tmp_path / "killed", watcher=Counter())
    assert heard == [(12, after)]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    before = (tmp_path / "killed/lines.jsonl").read_bytes()
    run(tmp_path / "killed")
    assert (tmp_path / "killed/lines.jsonl").read_bytes() == before, "nothing is run twice"


def test_the_table_is_read_back_equal_and_written_whole(tmp_path):
    table = run(tmp_path / "run")
    assert CalibrationTable.read(tmp_path / "run/calibration.json") == table
    assert not list((tmp_path / "run").glob("*.part"))
    assert not (tmp_path / "run/.lock").exists()
    assert table.sources["thing"].model_dump() == {"title": "A thing", "planted": 3, "null": 3, "failed": 0}
    assert table.cost["test.a"].runs == 6
    assert "tomoscope" in table.versions


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 99}', '{"schema_version": 1, "rows": 3}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(LedgerError):
        CalibrationTable.read(tmp_path / "table.json")
    with pytest.raises(LedgerError):
        CalibrationTable.read(tmp_path / "nowhere.json")


def test_another_calibration_is_not_overwritten_unless_forced(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(LedgerError, match=r"another calibration \(other seeds\)"):
        run(tmp_path / "run", seeds=2)
    assert run(tmp_path / "run", seeds=2, force=True).seeds == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(LedgerError, match=r"mine\.txt"):
            run(tmp_path / "other", force=force)
    with pytest.raises(LedgerError, match="not a folder"):
        run(tmp_path / "other/mine.txt")


def test_a_broken_line_in_the_middle_is_said(tmp_path):
    run(tmp_path / "run")
    path = tmp_path / "run/lines.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(LedgerError, match="line 1 is broken"):
        run(tmp_path / "run")


def test_only_one_process_writes(tmp_path):
    from tomoscope.findings.files import acquire_lock, release_lock

    (tmp_path / "run").mkdir()
    lock = acquire_lock(tmp_path / "run")
    with pytest.raises(LedgerError, match="Another process"):
        run(tmp_path / "run")
    release_lock(tmp_path / "run", lock)
    run(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"exams": ["observe.head_role"]}, ProtocolError, "observe.head_roles"),
        ({"phantoms": ["untraind"]}, DataError, "untrained"),
        ({"preset": "standrad"}, ProtocolError, "standard"),
        ({"seeds": 0}, ProtocolError, "1 or more"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        calibrate(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_names_patterns_and_values_make_a_plan():
    plan = plan_calibration(exams=["circuits.*", thing_exam(oracle)], phantoms=["untr*", phantom()], preset="quick")
    assert [exam.name for exam, _ in plan.exams] == [
        "circuits.patching",
        "circuits.discovery",
        "circuits.attribution_graphs",
        "circuits.causal_tracing",
        "test.thing",
    ]
    assert plan.exams[0][1].n == EXAMS["circuits.patching"].presets["quick"]["n"]
    assert [case.key for case in plan.cases][:3] == ["untrained/null/0", "thing/planted/0", "thing/null/0"]
    assert {source.name for source in plan_calibration(preset="quick").sources} > {"routed", "untrained"}
    whole = plan_calibration()
    assert {exam.name for exam, _ in whole.exams} == set(EXAMS)
    assert {"untrained", "shuffled_answers"} <= {source.name for source in whole.sources}


def test_what_does_not_vary_is_one_specimen(tmp_path):
    table = run(tmp_path / "run", phantoms=[phantom(varies=False)], seeds=5)
    assert (table.row("test.a").planted.claims, table.row("test.a").nulls.claims) == (1, 1)
    assert table.row("test.a").area.low < 0.5


def test_a_phantom_that_cannot_be_made_is_counted_and_tried_again(tmp_path):
    broken = [True]

    def build(seed):
        if seed == 1 and broken[0]:
            raise ValueError("no room")
        return phantom().build(seed)

    one = dataclasses.replace(phantom(), build=build)
    table = run(tmp_path / "run", phantoms=[one])
    assert table.sources["thing"].failed == 1
    assert table.row("test.a").planted.claims == 2
    broken[0] = False
    table = run(tmp_path / "run", phantoms=[one])
    assert table.sources["thing"].failed == 0
    assert table.row("test.a").planted.claims == 3


def test_an_exam_that_failed_is_run_again(tmp_path):
    broken = [True]

    def answer(subject, rng):
        if broken[0]:
            raise ValueError("the roof fell in")
        return oracle(subject, rng)

    exam = thing_exam(answer)
    assert run(tmp_path / "run", exams=[exam]).row(exam.name).planted.failed == 3
    assert "the roof fell in" in (tmp_path / "run/lines.jsonl").read_text()
    broken[0] = False
    assert run(tmp_path / "run", exams=[exam]).row(exam.name).sensitivity.value == 1


def test_the_same_model_under_another_name_is_examined_once_and_counts_once(tmp_path):
    import torch

    examined = []

    def answer(subject, rng):
        examined.append(subject.name)
        return 0.5, 3

    def made(name: str) -> Phantom:
        def make(seed: int) -> Specimen:
            subject = DummySubject(name=name)
            subject.model, subject.tokenizer = torch.nn.Linear(2, 2), None
            torch.nn.init.constant_(subject.model.weight, float(seed))
            torch.nn.init.constant_(subject.model.bias, 0.0)
            return Specimen(subject, Card(name, seed, "", (Known("thing", {}),)))

        return Phantom(name, "planted", name, build=make, null=phantom().null)

    exam = thing_exam(answer)
    table = run(tmp_path / "run", exams=[exam], phantoms=[made("first"), made("second")])
    assert [name for name in examined if name in ("first", "second")] == ["first"] * 3
    row = table.row(exam.name)
    assert (row.planted.claims, row.planted.specimens, row.sources) == (3, 3, {"first": 6, "second": 6})
    lines = [json.loads(line) for line in (tmp_path / "run/lines.jsonl").read_text().splitlines()]
    assert [line["same_as"] for line in lines if line.get("same_as")] == [f"first/planted/{i}" for i in range(3)]
