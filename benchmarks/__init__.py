"""Headline figures, one file each: `python -m benchmarks [name ...]`. Ratios within one run, on an idle machine."""
