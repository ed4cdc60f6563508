"""Builds the reference pages of docs/api/ from the docstrings in the source.

One page a public package, from its `__all__`: the package's and its modules' docstrings, and each name with its
signature and docstring; besides, the command line from its own options, the exams and the tasks from their registries.
Guide pages beside this file are written by hand. A page can mislead only where a docstring does: nothing is copied.

    python docs/build.py            write the pages, and the README's table of figures (docs/figures.json)
    python docs/build.py --check    exit with 1 if a committed page is not what would be written

Steps: find the exported names, read their source with `ast` (so that a page is the same on every machine: no addresses,
no paths), render Markdown, write or compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / "src"), str(DOCS), str(ROOT)]

NOTE = "<!-- Built by docs/build.py from the source; edit the docstrings, then run `make docs`. -->\n\n"
BEGIN, END = "<!-- figures: from docs/figures.json by `make docs` -->", "<!-- end of figures -->"
PACKAGES = (
    "tomoscope",
    "tomoscope.model",
    "tomoscope.data",
    "tomoscope.observe",
    "tomoscope.circuits",
    "tomoscope.circuits.attribution",
    "tomoscope.activations",
    "tomoscope.features",
    "tomoscope.features.training",
    "tomoscope.concepts",
    "tomoscope.treat",
    "tomoscope.findings",
    "tomoscope.findings.figures",
    "tomoscope.exams",
    "tomoscope.exams.calibration",
    "tomoscope.scan",
    "tomoscope.phantoms",
    "tomoscope.phantoms.world",
    "tomoscope.errors",
    "tomoscope.axes",
)


def pages() -> dict[str, str]:
    """Every built page: file name in docs/api/ -> Markdown."""
    from builder import calibration, catalogue, commands, families, reference, world

    built = {f"{name.removeprefix('tomoscope.')}.md": reference.package_page(name) for name in PACKAGES}
    built["command-line.md"] = commands.page()
    built["exams-and-protocols.md"] = catalogue.exams_page()
    built["tasks.md"] = catalogue.tasks_page()
    built["families.md"] = families.page()
    built["micro-world.md"] = world.page()
    built["calibration.md"] = calibration.page()
    return {name: NOTE + text.rstrip() + "\n" for name, text in built.items()}


def figures_table(figures: dict[str, Any]) -> str:
    """The table of speed figures as Markdown; what was not measured says so."""
    where = figures["measured_on"]
    rows = [f"Measured on {where}." if where else "Not measured yet on an idle machine.", ""]
    rows += ["| work | to reach | measured | by |", "|---|---|---|---|"]
    for one in figures["figures"]:
        rows.append(f"| {one['what']} | {one['target']} | {one['measured'] or 'not measured yet'} | {one['by']} |")
    return "\n".join(rows)


def readme() -> str:
    """The README with the table of docs/figures.json between its two marks."""
    text = _read(ROOT / "README.md")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = figures_table(json.loads(_read(DOCS / "figures.json")))
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare them with the committed ones; the exit code."""
    parser = argparse.ArgumentParser(description="Build docs/api/ from the docstrings.")
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 if a page is not current")
    check = parser.parse_args(arguments).check
    folder, built = DOCS / "api", pages()
    folder.mkdir(exist_ok=True)
    stale = [name for name, text in built.items() if _read(folder / name) != text]
    if _read(ROOT / "README.md") != readme():
        stale.append("../../README.md")
        built["../../README.md"] = readme()
    extra = sorted(path.name for path in folder.glob("*.md") if path.name not in built)
    if check:
        for name in [*stale, *extra]:
            sys.stderr.write(f"docs/api/{name} is not current: run `make docs`\n")
        return 1 if stale or extra else 0
    for name in stale:
        (folder / name).write_text(built[name], encoding="utf-8")
    for name in extra:
        (folder / name).unlink()
    sys.stdout.write(f"docs/api: {len(built)} pages, {len(stale)} written, {len(extra)} removed\n")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
