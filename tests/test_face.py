"""The package's face: complete, lazy, and light."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tomoscope

SOURCE = Path(__file__).resolve().parents[1] / "src"
HEAVY = ("torch", "transformers", "numpy", "scipy", "pydantic")


def test_every_name_is_its_home_package_s_own():
    assert set(tomoscope.__all__) == {"__version__", *tomoscope._FACE}
    for name, home in tomoscope._FACE.items():
        assert getattr(tomoscope, name) is getattr(importlib.import_module(home), name)
        exported = getattr(importlib.import_module(home), "__all__", [name])
        assert name in exported, f"{home} does not export {name}"


def test_a_name_never_hides_a_package():
    packages = {path.parent.name for path in (SOURCE / "tomoscope").glob("*/__init__.py")}
    assert not packages & set(tomoscope.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_modle'"):
        tomoscope.open_modle  # noqa: B018


def loaded_by(statement: str) -> list[str]:
    code = f"import sys; {statement}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    environment = {"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    assert loaded_by("import tomoscope; dir(tomoscope); tomoscope.__version__") == []


def test_errors_and_records_load_no_torch():
    assert not {"torch", "transformers"} & set(loaded_by("from tomoscope import Ledger, TomoscopeError"))
