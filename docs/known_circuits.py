"""Measures edge scores and circuit discovery on every compiled program, and writes docs/known_circuits.json.

    python docs/known_circuits.py                all programs, two seeds each (about 10 minutes on 2 cores)
    python docs/known_circuits.py --only compiled_induction

Lines are written as they come, so that a run which was stopped goes on where it was; `make docs` makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent / "src")]
SEEDS = (0, 1)
PAIRS = {"zero": 0, "paired": 32, "ACDC": 32, "EAP": 32, "EAP-IG-inputs": 32, "EAP-IG-activations": 8}
"""Pairs of a method: fewer where each costs many points of a path."""
STEPS = {"EAP-IG-inputs": 4000}
"""Points of the path, where not the default; such a method is not resampled."""
FOUND = DOCS / "known_circuits.json"


def main(only: list[str], resamples: int) -> None:
    """Measure what is not yet in the file."""
    from tomoscope.exams.calibration.known_circuits import METHODS, rank_edges
    from tomoscope.findings.files import write_json
    from tomoscope.phantoms.compiled.specimens import RECIPES

    rows = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else []
    have = {(row["program"], row["seed"], row["method"]) for row in rows}
    for recipe in RECIPES:
        for seed in SEEDS:
            wanted = [m for m in METHODS if (recipe.name, seed, m) not in have]
            if not wanted or (only and recipe.name not in only):
                continue
            specimen = recipe.specimen(seed)
            for method in wanted:
                steps = STEPS.get(method)
                told = asdict(
                    rank_edges(
                        specimen,
                        method,
                        pairs=PAIRS[method],
                        resamples=0 if steps else resamples,
                        steps=steps,
                        seed=seed,
                    )
                )
                rows.append({"program": recipe.name, "seed": seed, **told})
                write_json(FOUND, rows)
                sys.stderr.write(f"{recipe.name} {seed} {method}: {told}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--resamples", type=int, default=4)
    main(**vars(parser.parse_args()))
