"""A step of SAELens's or sparsify's TopK training, as they ship it; prints one line of JSON.

Environment: `pip install torch==2.13.0 sae-lens==6.54.12`, then `pip install --no-deps eai-sparsify==1.3.3 natsort
schedulefree simple-parsing docstring-parser`. SAELens runs in its best mode on a CPU (autocast to bfloat16), sparsify
with Adam; both at a constant rate on the rows of benchmarks/dictionary_training.py.

    python dictionaries.py saelens --steps 12
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch.nn.functional import embedding_bag, normalize

D, F, K, B = 512, 8192, 32, 4096


def rows(batches: int = 8) -> torch.Tensor:
    """The same rows as in dictionary_training.py; the model is seeded apart, or it would begin at the answer."""
    draw = torch.Generator().manual_seed(12345)
    n, m = B * batches, 2 * D
    directions = normalize(torch.randn(m, D, generator=draw), dim=-1)
    which = torch.randint(0, m, (n, 16), generator=draw)
    size = torch.rand(n, 16, generator=draw) + 0.5
    x = embedding_bag(which, directions, per_sample_weights=size, mode="sum")
    x = x + 0.02 * torch.randn(n, D, generator=draw)
    return x * (D**0.5 / x.norm(dim=-1).mean())


def batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Batches in order, again and again."""
    while True:
        yield from x.split(B)


def saelens(x: torch.Tensor, total: int, rate: float):
    """A training step and the reconstruction of SAELens."""
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, device="cpu", use_sparse_activations=False,
                              normalize_activations="none")
    )  # fmt: skip
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=total, device="cpu",
        autocast=True, lr=rate, lr_end=rate, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=B, dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches(x))

    def step(batch: torch.Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step, sae


def sparsify(x: torch.Tensor, total: int, rate: float):
    """A training step and the reconstruction of sparsify."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.set_float32_matmul_precision("high")
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), device="cpu", dtype=torch.float32)
    sae.b_dec.data = x[:B].mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=rate)
    since = torch.zeros(F, dtype=torch.long)

    def step(batch: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        fired = torch.zeros(F, dtype=torch.bool)
        out = sae(batch)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        since.add_(len(batch))
        since[fired] = 0

    return step, lambda rows: sae(rows).sae_out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=("saelens", "sparsify"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    x = rows()
    make = saelens if given.tool == "saelens" else sparsify
    step, reconstruct = make(x, (given.steps + given.warmup) * B, given.rate)
    source = batches(x)
    for _ in range(given.warmup):
        step(next(source))
    seconds, cpu = [], time.process_time()
    for _ in range(given.steps):
        start = time.perf_counter()
        step(next(source))
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / given.steps
    wall = sorted(seconds)[len(seconds) // 2]
    with torch.no_grad():
        first = x[:B]
        fvu = float((reconstruct(first) - first).square().sum() / (first - first.mean(0)).square().sum())
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": B / wall, "fvu": fvu}))


if __name__ == "__main__":
    main()
