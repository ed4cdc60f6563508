"""Every head x position patched: the engine against one plain forward a patch, and against the floor.

The floor: a patch changes, on average, half of the layers and half of the positions, so a quarter of a forward's
products.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.common import gpt2_small, matmul_rate, tell
from tomoscope.circuits import LogitDifference, Pairs, activation_patching


def main(length: int = 16, sample: int = 36, rounds: int = 2) -> None:
    subject = gpt2_small()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 50257, (1, length), generator=generator)
    corrupted = clean.clone()
    corrupted[0, 4:7] = torch.randint(0, 50257, (3,), generator=generator)
    pairs = Pairs(
        subject.tokens(clean.tolist()), subject.tokens(corrupted.tolist()), torch.tensor([[5]]), torch.tensor([[6]])
    )
    metric = LogitDifference([[5]], [[6]])
    patches = 12 * 12 * length
    values = subject.read(pairs.clean, "layer.*.attn.z")

    def one(layer: int, head: int, position: int) -> float:
        """One plain forward of transformers with one hook of torch's own: what a script by hand would do."""

        def patch(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = args[0].clone()
            z[:, position, 64 * head : 64 * (head + 1)] = values[f"layer.{layer}.attn.z"][:, position, head]
            return (z,)

        handle = subject.model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(patch)
        with torch.no_grad():
            logits = subject.model(corrupted).logits[:, -1]
        handle.remove()
        return float(metric(logits, torch.tensor([0])))

    block = sum(p.numel() for p in subject.model.transformer.h.parameters())
    for _ in range(rounds):
        places = torch.randint(0, 12 * 12 * length, (sample,), generator=generator).tolist()
        cells = [(p // (12 * length), p // length % 12, p % length) for p in places]
        start = time.perf_counter()
        naive = [one(*cell) for cell in cells]
        naive_seconds = (time.perf_counter() - start) / sample * patches
        start = time.perf_counter()
        grid = activation_patching(subject, pairs, part="attn.z", metric=metric)
        seconds = time.perf_counter() - start
        worst = max(abs(float(grid.values[lay, p, h, 0]) - x) for (lay, h, p), x in zip(cells, naive, strict=True))
        floor = patches * 2 * block * length / 4 / matmul_rate()
        tell(
            "patch_grid.heads", patches=patches, seconds=seconds, one_by_one_seconds=naive_seconds, sampled=sample,
            speedup=naive_seconds / seconds, floor_seconds=floor, times_floor=seconds / floor, mode=grid.mode,
            worst=worst,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--sample", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=2)
    main(**vars(parser.parse_args()))
