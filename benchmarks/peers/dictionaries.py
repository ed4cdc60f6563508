"""A step of SAELens's or sparsify's TopK training, as they ship it; prints one line of JSON.

Environment: `pip install torch==2.13.0 sae-lens==6.54.12`, then `pip install --no-deps eai-sparsify==1.3.3 natsort
schedulefree simple-parsing docstring-parser`. SAELens runs in its best mode on a CPU (autocast to bfloat16), sparsify
with Adam; both at a constant rate.

    python dictionaries.py saelens --steps 12
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch.nn.functional import embedding_bag, normalize

D, F, K, B = 512, 8192, 32, 4096


class Planted:
    """Sparse sums of planted directions; the model is seeded apart, or it would begin at the answer."""

    def __init__(self) -> None:
        self.directions = normalize(torch.randn(2 * D, D, generator=torch.Generator().manual_seed(12345)), dim=-1)
        self.scale = 1.0
        self.scale = D**0.5 / float(self.batch(0).norm(dim=-1).mean())

    def batch(self, index: int) -> torch.Tensor:
        """Batch number `index`, no row of which is in another: sums of 16 of 1,024 directions and a little noise."""
        draw = torch.Generator().manual_seed(index)
        which = torch.randint(0, 2 * D, (B, 16), generator=draw)
        x = embedding_bag(
            which, self.directions, per_sample_weights=torch.rand(B, 16, generator=draw) + 0.5, mode="sum"
        )
        return (x + 0.02 * torch.randn(B, D, generator=draw)) * self.scale


def saelens(first: torch.Tensor, total: int, rate: float):
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
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(batch: torch.Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step, sae


def sparsify(first: torch.Tensor, total: int, rate: float):
    """A training step and the reconstruction of sparsify."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.set_float32_matmul_precision("high")
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K), device="cpu", dtype=torch.float32)
    sae.b_dec.data = first.mean(0)
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
    parser.add_argument("--at", type=int, nargs="*", default=[], help="steps after which the loss is told, too")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    data, held = Planted(), Planted().batch(0)
    make = saelens if given.tool == "saelens" else sparsify
    total = given.steps + given.warmup
    step, reconstruct = make(data.batch(1), total * B, given.rate)

    def unexplained() -> float:
        with torch.no_grad():
            return float((reconstruct(held) - held).square().sum() / (held - held.mean(0)).square().sum())

    seconds, cpu, losses = [], [], {}
    for index in range(total):
        batch = data.batch(index + 1)
        start, used = time.perf_counter(), time.process_time()
        step(batch)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if index + 1 in given.at or index + 1 == total:
            losses[f"fvu_{index + 1}"] = unexplained()
    wall = sorted(seconds[given.warmup :])[given.steps // 2]
    spent = sum(cpu[given.warmup :]) / given.steps
    print(json.dumps({"seconds": wall, "cpu_seconds": spent, "tokens_per_second": B / wall, **losses}))


if __name__ == "__main__":
    main()
