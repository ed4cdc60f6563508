"""What the benchmarks share: GPT-2 small's shape with random weights, interleaved timing, one line of JSON a figure."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tomoscope.model import Subject, build_subject


def gpt2_small(*, attention: str = "sdpa") -> Subject:
    """GPT-2 small's architecture (12 layers, 768 wide, 12 heads), random weights from a seed, float32."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_implementation=attention)
    return build_subject(transformers.GPT2LMHeadModel(config).eval(), name="gpt2-small shape")


def interleaved(works: dict[Any, Callable[[], Any]], *, rounds: int) -> dict[Any, list[float]]:
    """Seconds of each work, one after the other in each round, so that a slow moment hits all alike."""
    out: dict[Any, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            out[name].append(time.perf_counter() - start)
    return out


def ratio(times: dict[Any, list[float]], name: Any, base: Any) -> float:
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


class Peer:
    """A public implementation in a process of its own, which does one piece of work for every line it is given.

    Args:
        python: an interpreter of an environment that has the implementation.
        script: its name in `peers/`.
        arguments: of the script.
    """

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        path = Path(__file__).parent / "peers" / script
        self.process = subprocess.Popen(
            [python, str(path), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, line: str = "go") -> dict[str, Any]:
        """One piece of work; what the peer says of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the peer's process ended: see its error above")
        return json.loads(answer)
