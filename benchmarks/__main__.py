"""Run the benchmarks one after the other: `python -m benchmarks [name ...]`."""

from __future__ import annotations

import importlib
import sys

NAMES = ("read_overhead", "patch_grid", "attribution_graph", "probes", "scan_time")

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
