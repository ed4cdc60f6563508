"""A step of TopK training (d 512, 8,192 latents, k 32, batch 4,096) against SAELens, sparsify, and the floor.

    python -m benchmarks.dictionary_training                                            ours and the floor
    python -m benchmarks.dictionary_training --saelens PY --sparsify PY                 and the peers

Peers run in environments of their own (`PY`: their python), in turn with ours; `peers/dictionaries.py` says what to
install. Loss is compared after as many tokens (`--at 60`), all with Adam at one constant rate, on the same fresh rows:
the fraction of variance unexplained of 4,096 rows that none was trained on. The floor is one bfloat16 encoder product,
a top-k (ours and torch's) and four gathers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import embedding_bag

from benchmarks.common import tell
from benchmarks.peers.dictionaries import Planted
from tomoscope.activations import Moments
from tomoscope.features.training import DictionaryTraining, TrainConfig, finished_coder
from tomoscope.features.training.bags import Active, ByLatent, pair_products
from tomoscope.features.training.topk import top_k

D, F, K, B = 512, 8192, 32, 4096
PEERS = ("saelens", "sparsify")
SCRIPT = Path(__file__).with_name("peers") / "dictionaries.py"


def timed(work: Callable[[int], object], steps: int, warmup: int) -> tuple[float, float]:
    """Median wall seconds and mean CPU seconds of a step, what `work` does to get its batch included."""
    for step in range(warmup):
        work(step)
    seconds, cpu = [], time.process_time()
    for step in range(steps):
        start = time.perf_counter()
        work(warmup + step)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2], (time.process_time() - cpu) / steps


def ours(steps: int, warmup: int, precision: str, rate: float, at: list[int]) -> dict[str, float]:
    """A training of ours, as `train` runs it, with the rate held as the peers hold it."""
    data, held, total = Planted(), Planted().batch(0), steps + warmup
    first = data.batch(1)
    config = TrainConfig(
        latents=F, k=K, batch=B, steps=total, learning_rate=rate, warmup=0, decay=0, precision=precision
    )
    training = DictionaryTraining(config, {"": D}, {"": Moments.of(first)})
    training.begin({"": first})
    seconds, cpu, losses = [], [], {}
    for index in range(total):
        batch = {"": data.batch(index + 1)}
        start, used = time.perf_counter(), time.process_time()
        training.step(batch)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if index + 1 in at or index + 1 == total:
            coder = finished_coder(training)
            lost = (coder(held) - held).square().sum() / (held - held.mean(0)).square().sum()
            losses[f"fvu_{index + 1}"] = float(lost)
    wall = sorted(seconds[warmup:])[steps // 2]
    return {"seconds": wall, "cpu_seconds": sum(cpu[warmup:]) / steps, "tokens_per_second": B / wall, **losses}


def floor(steps: int, *, plain: bool) -> dict[str, float]:
    """What no such step can leave out."""
    x = Planted().batch(1)
    low, W = x.bfloat16(), torch.randn(F, D) / D**0.5
    shadow = W.bfloat16()
    held = torch.empty(1024, F, dtype=torch.bfloat16)
    choose = (lambda pre, k: pre.topk(k, dim=1, sorted=False)) if plain else top_k

    def step(_: int) -> None:
        found = [choose(torch.mm(low[i : i + 1024], shadow.T, out=held), K) for i in range(0, B, 1024)]
        values, latents = torch.cat([v for v, _ in found]).float(), torch.cat([i for _, i in found])
        sample = torch.arange(B).repeat_interleave(K)
        active = Active(sample, latents.flatten(), B, F)
        embedding_bag(latents, W, per_sample_weights=values, mode="sum")
        weight = pair_products(x, W, active)
        ordered = ByLatent.of(active)
        ordered.rows(x, values.flatten())
        ordered.rows(x, weight)

    wall, cpu = timed(step, steps, 2)
    return {"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": B / wall}


def peer(python: str, name: str, steps: int, warmup: int, rate: float, at: list[int]) -> dict[str, float]:
    """One run of a peer, which prints one line of JSON."""
    given = [python, str(SCRIPT), name, "--steps", str(steps), "--warmup", str(warmup), "--rate", str(rate)]
    given += ["--threads", str(torch.get_num_threads()), "--at", *map(str, at)]
    out = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=4e-4, help="of all tools")
    parser.add_argument("--at", type=int, nargs="*", default=[], help="steps after which the loss is told, too")
    for name in PEERS:
        parser.add_argument(f"--{name}", default="", help=f"the python of {name}'s environment")
    given = parser.parse_args([] if arguments is None else arguments)
    for _ in range(given.rounds):
        run = (given.steps, given.warmup)
        figures = {"ours": ours(*run, "bfloat16", given.rate, given.at)}
        for name in PEERS:
            if getattr(given, name):
                figures[name] = peer(getattr(given, name), name, *run, given.rate, given.at)
        figures["ours_float32"] = ours(*run, "float32", given.rate, given.at)
        figures["floor"] = floor(given.steps, plain=False)
        figures["floor_torch_topk"] = floor(given.steps, plain=True)
        for name, numbers in figures.items():
            tell(f"dictionary_training.{name}", **numbers)
        mine = figures["ours"]["seconds"]
        ratios = {f"{name}_over_ours": one["seconds"] / mine for name, one in figures.items() if name != "ours"}
        tell("dictionary_training.ratios", **ratios)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
