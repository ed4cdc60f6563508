"""Dashboards a feature: one columnar pass, in CPU seconds, at GPT-2 small's width.

    python -m benchmarks.feature_dashboards --features 4096 --rows 256 --length 128

Harvest (the model's forward and the encoder) and summary are timed apart. The figure to compare with SAEDashboard's is
CPU seconds a feature at the same features, rows and length; it is not run here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import gpt2_small, tell
from tomoscope.features import DashboardOptions, SparseCoder, TopK, harvest_codes, make_dashboards


def main(arguments: list[str] | None = None) -> None:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args([] if arguments is None else arguments)
    subject, generator = gpt2_small(), torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(given.features, 768, generator=generator), dim=-1)
    coder = SparseCoder(
        W.T.contiguous(), W, torch.zeros(given.features), torch.zeros(768), TopK(32), reads="layer.6.resid_pre"
    )
    rows = torch.randint(50_257, (given.rows, given.length), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        store = harvest_codes(subject, coder, rows, Path(folder) / "codes")
        middle = time.process_time()
        make_dashboards(subject, coder, store, Path(folder) / "book", options=DashboardOptions())
        end = time.process_time()
    tell(
        "feature_dashboards", features=given.features, tokens=store.n_tokens, harvest_cpu_s=middle - start,
        summary_cpu_s=end - middle, cpu_ms_a_feature=(end - start) / given.features * 1e3,
    )  # fmt: skip


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
