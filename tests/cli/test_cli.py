from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.dummies import DummySubject, make_exam
from tomoscope.cli import common
from tomoscope.cli.main import app
from tomoscope.cli.scan import default_folder, parse_options
from tomoscope.cli.sites import grouped
from tomoscope.errors import ModelNotFoundError, ProtocolError
from tomoscope.exams import EXAMS, register
from tomoscope.findings import Ledger

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


@dataclass
class Info:
    axes: tuple[str, ...]
    available: bool = True
    reason: str = ""
    note: str = ""


class Subject(DummySubject):
    def sites(self):
        names = {f"layer.{i}.resid_post": Info(("batch", "position", "d_model")) for i in range(4)}
        return names | {"layer.2.router": Info(("batch",), False, "this family has no experts [yet]")}


@pytest.fixture
def exams(monkeypatch):
    monkeypatch.setattr(common, "open_subject", lambda source, **options: Subject(name=source or "embedded"))
    for name in ("dummy.a", "dummy.b"):
        register(make_exam(name))
    yield
    for name in ("dummy.a", "dummy.b"):
        EXAMS.unregister(name)


@pytest.fixture
def protocol(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[[exam]]\nname = "dummy.*"\n')
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_scan_writes_a_run_and_its_report_and_says_what_it_found(exams, protocol, tmp_path):
    result = run("scan", "some/model", "--protocol", protocol, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "confirmed  2" in result.stdout
    assert "Head 3 stands out." in result.stdout
    assert "report.html" in result.stdout
    assert (tmp_path / "run/report.html").stat().st_size > 5000
    manifest = Ledger.open(tmp_path / "run").manifest
    assert manifest.provenance.passed == {
        "model": "some/model",
        "protocol": str(protocol),
        "output": str(tmp_path / "run"),
    }
    assert manifest.provenance.defaulted["dtype"] is None


def test_scan_json_is_one_document(exams, protocol, tmp_path):
    result = run("scan", "--protocol", protocol, "--out", tmp_path / "run", "--json", "--seed", 7)
    document = json.loads(result.stdout)
    assert document["manifest"]["seed"] == 7
    assert [item["id"] for item in document["findings"]] == ["dummy.a/strongest", "dummy.b/strongest"]
    assert document["report"].endswith("report.html")


def test_the_reproduce_command_gives_the_same_numbers(exams, protocol, tmp_path):
    run("scan", "M", "-p", protocol, "-o", tmp_path / "run", "--seed", 2, "--option", "dummy.b.prompts=30")
    whole = Ledger.open(tmp_path / "run").finding("dummy.b/strongest")
    words = whole.reproduce.split()
    assert words[:2] == ["tomoscope", "scan"]
    result = run(*words[1:], "-p", protocol, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    again = Ledger.open(tmp_path / "again").findings()
    assert [item.estimate for item in again] == [whole.estimate]
    assert again[0].p_value == whole.p_value


def test_show(exams, protocol, tmp_path):
    run("scan", "-p", protocol, "-o", tmp_path / "run")
    shown = run("show", tmp_path / "run")
    assert "confirmed  2" in shown.stdout
    assert "Holm over 2 claims" in shown.stdout
    assert shown.stdout.count("uncalibrated (never run on phantoms)") == 2
    one = run("show", tmp_path / "run", "--finding", "dummy.a/strongest")
    assert "uncalibrated (never run on phantoms)" in one.stdout
    assert "layer.0.attn.z[head=3]" in one.stdout, "square brackets are not markup"
    assert "control: other heads" in one.stdout
    document = json.loads(run("show", tmp_path / "run", "--finding", "dummy.a/strongest", "--json").stdout)
    assert [version["version"] for version in document["history"]] == [1, 2]
    assert len(json.loads(run("show", tmp_path / "run", "--json").stdout)["findings"]) == 2
    unknown = run("show", tmp_path / "run", "--finding", "dummy.a/strong")
    assert unknown.exit_code == 2
    assert "dummy.a/strongest" in unknown.stderr


def test_sites(exams):
    result = run("sites", "M")
    assert "layer.0-3.resid_post" in result.stdout
    assert "[yet]" in result.stdout
    document = json.loads(run("sites", "M", "--json").stdout)
    assert len(document["sites"]) == 5
    assert document["sites"][-1]["reason"] == "this family has no experts [yet]"
    every = run("sites", "M", "--every-layer").stdout
    assert "layer.3.resid_post" in every
    assert grouped([]) == []


def test_doctor(exams):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "python" in result.stdout
    document = json.loads(run("doctor", "M", "--json").stdout)
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["versions"]["torch"]
    assert document["model"]["facts"]["n_layers"] == 4
    assert {"dummy.a", "dummy.b"} <= set(document["model"]["exams"])
    assert document["model"]["sites_unavailable"][0]["site"] == "layer.2.router"
    EXAMS.unregister("dummy.b")
    register(make_exam("dummy.b", applies=lambda subject: "no heads"))
    assert "dummy.b: no heads" in run("doctor", "--embedded").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "standrad"], ["standrad", "standard"]),
        (["--exam", "dummy.aa"], ["dummy.aa", "dummy.a"]),
        (["--exam", "dummy.a", "--option", "prompt=3"], ["'prompt'", "'prompts'"]),
        (["--option", "prompts=3"], ["does not name its exam"]),
        (["--option", "dummy.a.prompts"], ["exam.key=value"]),
        (["--exam", "dummy.a", "--option", "prompts=many"], ["valid integer"]),
        (["--exam", "dummy.a", "--option", "dummy.b.prompts=9"], ["not part of this scan"]),
    ],
)
def test_mistakes_are_told_with_a_remedy(exams, protocol, tmp_path, arguments, words):
    result = run("scan", "-p", protocol, "-o", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "x"\n[[exam]]\nname = "nothing.here"\n', "nothing.here"),
        ('name = "x"\nbudget = 3\n[[exam]]\nname = "dummy.a"\n', "budget_seconds"),
        ('name = "x"\n[[exam]\n', "not TOML"),
        ('name = "x"\n', "exam"),
        ('name = "x"\ncorrection = "none of them"\n[[exam]]\nname = "dummy.a"\n', "correction"),
    ],
)
def test_a_protocol_that_is_wrong_names_its_file(exams, tmp_path, text, words):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    result = run("scan", "-p", path, "-o", tmp_path / "run")
    assert result.exit_code == 2
    said = result.stderr.replace("\n", "")
    assert words in said
    assert "wrong.toml" in said


def test_an_output_that_cannot_be_written(exams, protocol, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    opened = []
    monkeypatch.setattr(common, "open_subject", lambda source, **options: opened.append(source) or Subject())
    for place in (tmp_path / "file", tmp_path / "file/below", "/proc/tomoscope"):
        result = run("scan", "-p", protocol, "-o", place)
        assert result.exit_code == 2
        assert "--out" in result.stderr
    assert len(opened) <= 1, "a place that cannot hold a run is refused before the model is opened"


def test_errors_under_json_are_json_too(exams, protocol, tmp_path):
    result = run("show", tmp_path / "nowhere", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["kind"] == "LedgerError"


def test_traceback_is_shown_on_request(exams, tmp_path):
    result = run("show", tmp_path / "nowhere", "--traceback")
    assert type(result.exception).__name__ == "LedgerError"


def test_a_model_that_is_not_there(monkeypatch, protocol, tmp_path):
    def absent(source, **options):
        raise ModelNotFoundError(f"No model {source!r}.", remedy="Check the path.")

    monkeypatch.setattr(common, "open_subject", absent)
    register(make_exam("dummy.a"))
    result = run("scan", "nope", "-p", protocol, "-o", tmp_path / "run")
    EXAMS.unregister("dummy.a")
    assert result.exit_code == 2
    assert "Check the path." in result.stderr


def test_interrupt_ends_with_130_and_says_how_to_go_on(exams, protocol, tmp_path):
    def stop(context):
        raise KeyboardInterrupt
        yield

    EXAMS.unregister("dummy.b")
    register(make_exam("dummy.b", run=stop))
    result = run("scan", "-p", protocol, "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert "To go on:" in result.stderr
    assert [item.id for item in Ledger.open(tmp_path / "run").findings()] == ["dummy.a/strongest"]
    EXAMS.unregister("dummy.b")
    register(make_exam("dummy.b"))
    again = run("scan", "-p", protocol, "-o", tmp_path / "run")
    assert again.exit_code == 0
    assert "Resuming: 1 of 2 exams are done." in again.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_interrupt_of_a_real_process(tmp_path, number, code):
    source = f"""
import sys, time
from tests.dummies import DummySubject, make_exam, run_heads
from tomoscope.cli import common
from tomoscope.cli.main import main
from tomoscope.exams import register
def slow(context):
    print("working", file=sys.stderr, flush=True)
    time.sleep(60)
    yield
common.open_subject = lambda source, **options: DummySubject()
register(make_exam("dummy.a")); register(make_exam("dummy.b", run=slow))
open({str(tmp_path / "p.toml")!r}, "w").write('name="t"\\n[[exam]]\\nname="dummy.*"')
sys.argv = ["tomoscope", "scan", "-p", {str(tmp_path / "p.toml")!r}, "-o", {str(tmp_path / "run")!r}]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", source], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        # a test run in the background of a shell inherits an ignored SIGINT
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
    assert "kept" in said
    assert ("Terminated" if code == 143 else "Interrupted") in said
    assert Ledger.open(tmp_path / "run").manifest.status == "interrupted"


def test_help_is_light():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom tomoscope.cli.main import app\n"
        "commands = ([], ['scan'], ['show'], ['calibrate'], ['doctor'], ['sites'])\n"
        "results = [CliRunner().invoke(app, [*command, '--help']) for command in commands]\n"
        "assert all(result.exit_code == 0 for result in results)\n"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"


def test_version():
    assert run("--version").stdout.startswith("tomoscope ")


def test_options_are_parsed():
    assert parse_options(["a.b.n=3", "a.b.names=[1, 2]", "a.b.text=x=y"], []) == {
        "a.b": {"n": 3, "names": [1, 2], "text": "x=y"}
    }
    assert parse_options(["n=3"], ["e.x"]) == {"e.x": {"n": 3}}
    with pytest.raises(ProtocolError):
        parse_options(["=3"], ["e"])


def test_default_folders_stay_below_runs():
    assert default_folder("org/gpt2", "quick", [], 0) == Path("runs/gpt2/quick-0")
    for name in ("../../etc", "..", "", "/", "a b\n"):
        folder = default_folder(name, "../x", [], 1)
        assert ".." not in folder.parts
        assert not folder.is_absolute()
        assert folder.parts[0] == "runs"
