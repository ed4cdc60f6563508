"""Run the benchmarks one after the other: `python -m benchmarks [name ...]`."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "read_overhead", "patch_grid", "edge_scores", "circuit_growth", "attribution_graph", "activation_store",
    "dictionary_training", "feature_dashboards", "probes", "scan_time",
)  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
