"""What a package exports is exactly what it lists: sorted, importable, and each name with a docstring."""

from __future__ import annotations

import importlib
import inspect
import types
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tomoscope"
PACKAGES = sorted(
    ".".join(("tomoscope", *path.parent.relative_to(SOURCE).parts)) for path in SOURCE.rglob("__init__.py")
)


def public(package: types.ModuleType) -> set[str]:
    """The names that are the package's to give: nothing private, no modules, nothing that others define."""
    names = set()
    for name in dir(package):
        if name.startswith("_") or name == "annotations":
            continue
        thing = getattr(package, name)
        home = getattr(thing, "__module__", None) if inspect.isclass(thing) or inspect.isroutine(thing) else None
        foreign = home is not None and not f"{home}.".startswith(f"{package.__name__}.")
        if not isinstance(thing, types.ModuleType) and (not foreign or name in package.__all__):
            names.add(name)
    return names


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by the alphabet (as the linter sorts them)."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_exactly_what_is_importable(name):
    package = importlib.import_module(name)
    assert package.__doc__, f"{name} does not say what it is"
    listed = [item for item in package.__all__ if item != "__version__"]
    assert listed == sorted(listed, key=order), f"{name}.__all__ is not sorted"
    assert len(set(listed)) == len(listed)
    assert set(listed) == public(package)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_function_and_class_says_what_it_is(name):
    package = importlib.import_module(name)
    for item in package.__all__:
        thing = getattr(package, item)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert inspect.getdoc(thing), f"{name}.{item} has no docstring"
