"""One page of reference for each public package, from the source of what it exports."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import types
from pathlib import Path
from typing import Any

from builder.prose import docstring, escape

WIDTH = 100


def exported(name: str) -> list[str]:
    """The public names of a package or module, in the order of `__all__` (or of the source)."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return [item for item in module.__all__ if not item.startswith("__")]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = []
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [item for item in names if not item.startswith("_")]


def package_page(name: str) -> str:
    """A package's page: what it is, its modules' own words, then every exported name."""
    package = importlib.import_module(name)
    names = exported(name)
    out = [f"# {name}", docstring(inspect.getdoc(package) or "")]
    out.append(" · ".join(f"[{item}](#{item.lower()})" for item in names))
    if name == "tomoscope":
        return "\n\n".join([*out, *(_pointer(package, item) for item in names)])
    homes: dict[str, list[str]] = {}
    for item in names:
        homes.setdefault(_home(package, item), []).append(item)
    for home, items in homes.items():
        if home != name:
            out.append(f"## {home}")
            out.append(docstring(inspect.getdoc(importlib.import_module(home)) or ""))
        out += [entry(package, item, home) for item in items]
    return "\n\n".join(part for part in out if part)


def _home(package: types.ModuleType, item: str) -> str:
    """The module in which a name is defined."""
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == item for alias in node.names):
            module = importlib.import_module(str(node.module))
            return _home(module, item) if hasattr(module, "__path__") else str(node.module)
    return package.__name__


def _pointer(package: types.ModuleType, item: str) -> str:
    """On the face's page: one line, and where the whole entry stands."""
    home = str(vars(package)["_FACE"][item])
    thing = getattr(package, item)
    described = inspect.isclass(thing) or inspect.isroutine(thing)
    words = (inspect.getdoc(thing) or "") if described else _constant_words(home, item)
    first = " ".join(words.split("\n\n")[0].split()) or f"From {home}."
    return f"### {item}\n\n{escape(first)}\n\n[{home}.{item}]({home.removeprefix('tomoscope.')}.md#{item.lower()})"


def _constant_words(home: str, item: str) -> str:
    package = importlib.import_module(home)
    return _after(_module_tree(_home(package, item)).body, item)


def _module_tree(module: str) -> ast.Module:
    return ast.parse(Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8"))


def entry(package: types.ModuleType, item: str, home: str) -> str:
    """One exported name: its signature as written in the source, and its docstring."""
    node = _find(_module_tree(home), item)
    if isinstance(node, ast.FunctionDef):
        return f"### {item}\n\n{_fenced(_signature(node))}\n\n{docstring(ast.get_docstring(node) or '')}"
    if isinstance(node, ast.ClassDef):
        return _class(node)
    words = _after(_module_tree(home).body, item)
    kind = type(getattr(package, item)).__name__
    return f"### {item}\n\n{_fenced(f'{item}: {kind}')}" + (f"\n\n{docstring(words)}" if words else "")


def _find(tree: ast.Module, item: str) -> ast.stmt | None:
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == item:
            return node
    return None


def _after(body: list[ast.stmt], item: str) -> str:
    """The docstring that stands under an assignment."""
    for node, following in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == item for target in targets)
        value = following.value if isinstance(following, ast.Expr) else None
        if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
            return inspect.cleandoc(value.value)
    return ""


def _class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    words = ast.get_docstring(node) or ""
    fields = [line for line in (_field(node, child) for child in node.body) if line]
    if "Attributes:" in words or not any("`: " in line for line in fields):
        # told in the docstring: only their types are wanting
        head += "".join(f"\n    {line.split('`')[1]}" for line in fields)
        fields = []
    out = [f"### {node.name}", _fenced(head), docstring(words)]
    if fields:
        out += ["**Fields**", "\n".join(fields)]
    for child in node.body:
        public = isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name == "__init__")
        if not public or not isinstance(child, ast.FunctionDef):
            continue
        words = ast.get_docstring(child) or ""
        if not words and child.name == "__init__" and len(child.args.args + child.args.kwonlyargs) < 2:
            continue
        out += [f"#### {node.name}.{child.name}", _fenced(_signature(child)), docstring(words)]
    return "\n\n".join(part for part in out if part)


def _field(owner: ast.ClassDef, node: ast.stmt) -> str:
    """An annotated field as a line of a list, with the words under it."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id.startswith("_"):
        return ""
    default = f" = {_short(ast.unparse(node.value))}" if node.value else ""
    words = " ".join(_after(owner.body, node.target.id).split())
    return f"- `{node.target.id}: {ast.unparse(node.annotation)}{default}`" + (f": {escape(words)}" if words else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _signature(node: ast.FunctionDef) -> str:
    """`def` as written, one parameter a line where it is long; decorators that change its use come before."""
    marks = [f"@{name}\n" for name in map(ast.unparse, node.decorator_list) if name in _USES]
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){gives}"
    if len(line) > WIDTH:
        line = f"{node.name}(\n    " + ",\n    ".join(_parameters(node.args)) + f",\n){gives}"
    return "".join(marks) + line


_USES = ("property", "classmethod", "staticmethod", "cached_property", "contextmanager")


def _parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter as source text."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[Any] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    out = [_parameter(one, default) for one, default in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        out.append("*" + _parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        out.append("*")
    out += [_parameter(one, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return out


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    return f"{one.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"
