"""`tomoscope graph`: what it prints and writes, its page in one file, and mistakes told before the work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.exams.test_attribution_graphs import PROMPT, coders, specimen
from tomoscope.cli import common
from tomoscope.cli.main import app
from tomoscope.features import save_transcoders


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    monkeypatch.setattr(common, "open_subject", lambda source, **options: specimen("gpt2").subject)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("coders")
    save_transcoders(coders(specimen("gpt2")), place)
    return place


def run(*arguments):
    return CliRunner().invoke(app, ["graph", *(str(argument) for argument in arguments)])


def test_a_prompt_from_the_shell(folder, tmp_path):
    result = run("--transcoders", folder, "-p", PROMPT, "--tested", 2, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "' Paris'" in result.output
    assert "strongest edges into the answer" in result.output
    page = (tmp_path / "out" / "graph.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["answer"] == " Paris"
    assert (tmp_path / "out" / "graph.json").exists()


def test_json_and_why_a_head_attends(folder):
    layer, head = next(specimen("gpt2").card.of("feature_circuit")).value["head"][1:].split(".h")
    result = run("--transcoders", folder, "-p", PROMPT, "--attends", f"{layer}.{head}:4:3", "--json")
    told = json.loads(result.stdout)
    (why,) = told["attends"]
    assert why["pairs"][0][0] == "token ' is' p4"
    assert abs(why["gap"]) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "transcoders and a prompt"),
        (("--transcoders", "nowhere", "-p", "a"), "no folder"),
        (("--attends", "x", "--transcoders", "nowhere", "-p", "a"), "names no head"),
    ],
)
def test_mistakes(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_head_s_tokens_are_checked_before_the_graph(folder):
    result = run("--transcoders", folder, "-p", PROMPT, "--attends", "1.0:99:3")
    assert result.exit_code == 2
    assert "attributing" not in result.output


def test_hostile_tokens_are_escaped(folder, tmp_path):
    from tomoscope.findings.figures import graph
    from tomoscope.scan.single import write_page

    evil = "<script>alert(1)</script>"
    picture = graph(
        [[0, 0.5], [1, 0.5]], [[0, 1]], [1.0], nodes=[evil, "b"], levels=["x", "y"], title=evil, caption=evil
    )
    page = write_page(tmp_path / "page.html", evil, [picture], notes=[evil]).read_text(encoding="utf-8")
    assert "<script" not in page
