"""What the benchmarks share: GPT-2 small's shape with random weights, interleaved timing, one line of JSON a figure."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tomoscope.model import Subject, build_subject


def gpt2_small(*, attention: str = "sdpa") -> Subject:
    """GPT-2 small's architecture (12 layers, 768 wide, 12 heads), random weights from a seed, float32."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_implementation=attention)
    return build_subject(transformers.GPT2LMHeadModel(config).eval(), name="gpt2-small shape")


def interleaved(works: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, one after the other in each round, so that a slow moment hits all alike."""
    out: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            out[name].append(time.perf_counter() - start)
    return out


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the rounds' ratios: each round is its own comparison."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def tell(figure: str, **numbers: Any) -> None:
    """Print one figure, with the machine's load so that a reader can judge it."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    load = round(os.getloadavg()[0], 2)
    print(json.dumps({"figure": figure, **rounded, "threads": torch.get_num_threads(), "load": load}), flush=True)


def matmul_rate() -> float:
    """FLOP/s of this machine's float32 matrix products at the size that matters here."""
    left, right = torch.randn(2048, 768), torch.randn(768, 3072)
    for _ in range(3):
        left @ right
    start = time.perf_counter()
    for _ in range(20):
        left @ right
    return 20 * 2 * 2048 * 768 * 3072 / (time.perf_counter() - start)
