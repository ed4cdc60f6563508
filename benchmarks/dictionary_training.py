"""A step of TopK training (d 512, 8,192 latents, k 32, batch 4,096) against SAELens, sparsify, and the floor.

    python -m benchmarks.dictionary_training                                            ours and the floor
    python -m benchmarks.dictionary_training --saelens PY --sparsify PY                 and the peers

Peers run in environments of their own (`PY`: their python), in turn with ours; `peers/dictionaries.py` says what to
install. Loss is compared after as many tokens, at one learning rate, on the same rows: the fraction of variance
unexplained of the first 4,096. The floor is one bfloat16 encoder product, a top-k (ours and torch's) and four gathers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import embedding_bag, normalize

from benchmarks.common import tell
from tomoscope.activations import Moments
from tomoscope.features.training import DictionaryTraining, TrainConfig, finished_coder
from tomoscope.features.training.bags import Active, ByLatent, pair_products
from tomoscope.features.training.topk import top_k

D, F, K, B = 512, 8192, 32, 4096
RATE = 4e-4
PEERS = ("saelens", "sparsify")
SCRIPT = Path(__file__).with_name("peers") / "dictionaries.py"


def rows(batches: int = 8) -> torch.Tensor:
    """The peers' rows: sparse sums of 1,024 directions, a little noise, mean norm the root of the width."""
    draw = torch.Generator().manual_seed(12345)
    n, m = B * batches, 2 * D
    directions = normalize(torch.randn(m, D, generator=draw), dim=-1)
    which = torch.randint(0, m, (n, 16), generator=draw)
    size = torch.rand(n, 16, generator=draw) + 0.5
    x = embedding_bag(which, directions, per_sample_weights=size, mode="sum")
    x = x + 0.02 * torch.randn(n, D, generator=draw)
    return x * (D**0.5 / x.norm(dim=-1).mean())


def timed(work: Callable[[int], object], steps: int, warmup: int) -> tuple[float, float]:
    """Median wall seconds and mean CPU seconds of a step."""
    for step in range(warmup):
        work(step)
    seconds, cpu = [], time.process_time()
    for step in range(steps):
        start = time.perf_counter()
        work(warmup + step)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], (time.process_time() - cpu) / steps


def ours(x: torch.Tensor, steps: int, warmup: int, precision: str) -> dict[str, float]:
    """A training of ours, as `train` runs it, with the rate held as the peers hold it."""
    config = TrainConfig(
        latents=F, k=K, batch=B, steps=steps + warmup, learning_rate=RATE, warmup=0, decay=0, precision=precision
    )
    training = DictionaryTraining(config, {"": D}, {"": Moments.of(x[:B])})
    training.begin({"": x[:B]})
    count = len(x) // B
    wall, cpu = timed(lambda i: training.step({"": x[i % count * B : (i % count + 1) * B]}), steps, warmup)
    coder = finished_coder(training)
    missed = (coder(x[:B]) - x[:B]).square().sum() / (x[:B] - x[:B].mean(0)).square().sum()
    return {"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": B / wall, "fvu": float(missed)}


def floor(x: torch.Tensor, steps: int, *, plain: bool) -> dict[str, float]:
    """What no such step can leave out."""
    low, W = x[:B].bfloat16(), torch.randn(F, D) / D**0.5
    shadow = W.bfloat16()
    held = torch.empty(1024, F, dtype=torch.bfloat16)
    choose = (lambda pre, k: pre.topk(k, dim=1, sorted=False)) if plain else top_k

    def step(_: int) -> None:
        found = [choose(torch.mm(low[i : i + 1024], shadow.T, out=held), K) for i in range(0, B, 1024)]
        values, latents = torch.cat([v for v, _ in found]).float(), torch.cat([i for _, i in found])
        sample = torch.arange(B).repeat_interleave(K)
        active = Active(sample, latents.flatten(), B, F)
        embedding_bag(latents, W, per_sample_weights=values, mode="sum")
        weight = pair_products(x[:B], W, active)
        ordered = ByLatent.of(active)
        ordered.rows(x[:B], values.flatten())
        ordered.rows(x[:B], weight)

    wall, cpu = timed(step, steps, 2)
    return {"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": B / wall}


def peer(python: str, name: str, steps: int, warmup: int) -> dict[str, float]:
    """One run of a peer, which prints one line of JSON."""
    given = [python, str(SCRIPT), name, "--steps", str(steps), "--warmup", str(warmup), "--rate", str(RATE)]
    given += ["--threads", str(torch.get_num_threads())]
    out = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    for name in PEERS:
        parser.add_argument(f"--{name}", default="", help=f"the python of {name}'s environment")
    given = parser.parse_args([] if arguments is None else arguments)
    x = rows()
    for _ in range(given.rounds):
        figures = {"ours": ours(x, given.steps, given.warmup, "bfloat16")}
        for name in PEERS:
            if getattr(given, name):
                figures[name] = peer(getattr(given, name), name, given.steps, given.warmup)
        figures["ours_float32"] = ours(x, given.steps, given.warmup, "float32")
        figures["floor"] = floor(x, given.steps, plain=False)
        figures["floor_torch_topk"] = floor(x, given.steps, plain=True)
        for name, numbers in figures.items():
            tell(f"dictionary_training.{name}", **numbers)
        mine = figures["ours"]["seconds"]
        ratios = {f"{name}_over_ours": one["seconds"] / mine for name, one in figures.items() if name != "ours"}
        tell("dictionary_training.ratios", **ratios)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
