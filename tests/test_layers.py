"""Imports run downward only: each folder imports what its row of the table lists, and nothing of ours else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tomoscope"
GROUND = {"errors", "axes"}
METHODS = {
    "activations",
    "observe",
    "features",
    "concepts",
    "superposition",
    "vision",
    "circuits",
    "behaviours",
    "treat",
}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "axes": set(),
    "findings": {"errors"},
    "model": GROUND,
    "data": GROUND,
    "superposition": GROUND,
    "activations": GROUND | {"model", "data", "findings.provenance", "findings.files"},
    "observe": GROUND | {"model", "data"},
    "vision": GROUND | {"model", "data"},
    "behaviours": GROUND | {"model", "data"},
    "phantoms": GROUND | {"model", "data", "superposition"},
    # measures of dictionaries carry intervals, and their shards are written whole or not at all
    "features": GROUND
    | {
        "activations",
        "model",
        "data",
        "findings.control",
        "findings.estimate",
        "findings.files",
        "findings.provenance",
        "findings.record",
        "findings.roc",
        "findings.statistics",
    },
    "concepts": GROUND | {"activations", "model", "data", "findings"},
    "circuits": GROUND | {"features", "concepts", "activations", "model", "data"},
    "treat": GROUND | {"features", "concepts", "activations", "model", "data", "findings"},
    "exams": GROUND | METHODS | {"phantoms", "model", "data", "findings"},
    "scan": {"errors", "exams", "findings"},
    "viewer": {"errors", "scan", "findings", "model", "observe", "features"},
    "cli": {
        "errors",
        "scan",
        "viewer",
        "findings",
        "exams",
        "model",
        "features",
        "activations",
        "data",
        "phantoms",
    },
}
NO_TORCH = ("findings",)
"""Folders that never import torch, not even inside a call."""


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` gives "a" and "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """What a file imports of ours, as "folder" or "folder.module"."""
    return {name.removeprefix("tomoscope.") for name in imports(path) if name.startswith("tomoscope.")}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path):
    folder = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if folder == "__init__":
        return
    assert folder in ALLOWED, f"{folder}/ has no row in the table of floors: add one, and say why"
    for name in ours(path):
        top = name.split(".")[0]
        if top in (folder, "__version__"):
            continue
        fits = any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[folder])
        wider = any(allowed.startswith(name + ".") for allowed in ALLOWED[folder])
        assert fits or wider, f"{path.relative_to(SOURCE)} imports tomoscope.{name}, which lies above or beside it"


@pytest.mark.parametrize("folder", NO_TORCH)
def test_records_import_no_torch(folder):
    for path in (SOURCE / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "transformers"}, path


def test_the_table_has_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        free = {
            folder
            for folder, allowed in ALLOWED.items()
            if folder not in done and {name.split(".")[0] for name in allowed if name.split(".")[0] in ALLOWED} <= done
        }
        assert free, f"a circle among {set(ALLOWED) - done}"
        done |= free
