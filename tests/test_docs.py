"""The documentation is true: pages are current, links lead somewhere, code runs, commands and names exist."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from tomoscope.exams import EXAMS
from tomoscope.scan import parse_protocol

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *GUIDES, *sorted(DOCS.glob("api/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
RUNNABLE = [path for path in PAGES if "```python\n" in path.read_text(encoding="utf-8")]


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def builder():
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(path, language):
    return [code for kind, code in FENCE.findall(path.read_text(encoding="utf-8")) if kind == language]


def prose(path):
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    """The ids that a Markdown page's headings get: lower case, no punctuation, hyphens for spaces."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_built_pages_are_current():
    assert builder().main(["--check"]) == 0


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        page = (path.parent / place).resolve() if place else path
        assert page.exists(), f"{name_of(path)} links to {target}, which is not there"
        assert page.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(page), f"{name_of(path)} links to {target}: no such heading"


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_the_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(EXAMS)
    namespace = {"__name__": f"page_{path.stem}"}
    try:
        for code in blocks(path, "python"):
            exec(compile(code, name_of(path), "exec"), namespace)
    finally:
        for name in set(EXAMS) - before:
            EXAMS.unregister(name)


def test_every_guide_has_code_that_runs():
    assert {path for path in GUIDES if path not in RUNNABLE} == {DOCS / "README.md"}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_toml_is_a_protocol_that_can_be_planned(path):
    from tomoscope.scan import plan

    for text in blocks(path, "toml"):
        assert tomllib.loads(text)
        assert plan(parse_protocol(text, where=name_of(path)))


def commands(path):
    """Every command line that starts with tomoscope, from code spans and shell blocks."""
    lines = [line for code in (*blocks(path, "sh"), *blocks(path, "bash")) for line in code.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(path))
    return [line.split("#")[0].strip() for line in lines if re.match(r"tomoscope(\s|$)", line)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_and_option_exists(path):
    builder()
    tree = importlib.import_module("builder.commands").command_tree()
    for line in commands(path):
        words = shlex.split(line)[1:]
        if not words:
            continue
        name = words[0] if not words[0].startswith("-") else ""
        name = " ".join(words[:2]) if name and name not in tree and len(words) > 1 else name
        for each in name.split("|"):
            assert each in tree, f"{name_of(path)}: there is no command `{line}`"
            known = {option for parameter in tree[each].params for option in parameter.opts} | {"--help"}
            for word in words:
                assert not word.startswith("-") or word.split("=")[0] in known, f"{name_of(path)}: `{line}`: {word}"


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    for path in PAGES:
        for target in re.findall(r"`make ([a-z-]+)[` ]", path.read_text(encoding="utf-8")):
            assert target in targets, f"{name_of(path)}: `make {target}`"


def test_every_public_name_is_documented():
    builder()
    exported = importlib.import_module("builder.reference").exported
    for package in builder().PACKAGES:
        page = (DOCS / "api" / f"{package.removeprefix('tomoscope.')}.md").read_text(encoding="utf-8")
        for name in exported(package):
            assert f"\n### {name}\n" in page, f"{package}.{name} is on no page"


def test_every_public_package_has_a_page():
    source = ROOT / "src" / "tomoscope"
    packages = {f"tomoscope.{path.parent.name}" for path in source.glob("*/__init__.py")}
    assert packages - set(builder().PACKAGES) == {"tomoscope.cli"}


def test_every_page_can_be_reached():
    start, seen = DOCS / "README.md", set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", prose(path)):
            if not target.startswith("https://"):
                waiting.append((path.parent / target).resolve())
    assert {path.resolve() for path in (*GUIDES, *DOCS.glob("api/*.md"))} <= seen


def test_the_tree_in_the_readme_is_the_tree_that_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(code for kind, code in FENCE.findall(text) if "src/tomoscope/" in code)
    stack: list[str] = []
    named = set()
    for line in tree.splitlines():
        match = re.match(r"^( *)([\w./-]+)", line)
        if not match:
            continue
        depth = len(match[1]) // 2
        stack[depth:] = [match[2]]
        path = "".join(stack)
        assert (ROOT / path).exists(), f"the README's tree has {path}, which is not there"
        named.add(path.rstrip("/"))
    source = ROOT / "src" / "tomoscope"
    for entry in source.iterdir():
        if entry.name not in ("__pycache__", "__init__.py"):
            assert f"src/tomoscope/{entry.name}" in named, f"the README's tree lacks src/tomoscope/{entry.name}"


def test_the_figures_in_the_readme_are_those_recorded():
    """Speed figures stand in docs/figures.json; docs/build.py copies them into the README."""
    figures = json.loads((DOCS / "figures.json").read_text(encoding="utf-8"))
    assert builder().figures_table(figures) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_names_a_place_of_one_machine():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"/(?:home|root|tmp|Users|work)/", text)
        assert not found, f"{name_of(path)} holds {found[0]}"
        assert str(ROOT) not in text
        assert sys.prefix not in text
