"""Which latents of a batch have a code or a gradient: pre-activations are made a piece of rows at a time and dropped.

TopK (Gao et al. 2024, arXiv:2406.04093) takes k of each row; BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) k x
rows of the batch, for which a first guess of the threshold, from the last step, keeps the candidates few; the answer is
exact whatever the guess. All others take what lies above an edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.features.training.bags import Active
from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.parameters import Part
from tomoscope.features.training.rules import edge
from tomoscope.features.training.topk import top_k

ROWS = 1024
"""Rows whose pre-activations are held at once."""


@dataclass(frozen=True, eq=False)
class Found:
    """Entries of one part.

    Attributes:
        active: the entries.
        pre: [entry], pre-activations.
        threshold: the smallest that was chosen (of BatchTopK), for the next step's guess and for inference.
    """

    active: Active
    pre: Float[Tensor, " entry"]
    threshold: float = 0.0


def pieces(part: Part, x: Float[Tensor, "sample read"], rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
    """(first row, pre-activations [row, latent]) of each piece; the next piece overwrites the last."""
    low = part.widened(x)
    held = low.new_empty(min(rows, len(low)), len(part.b_enc))
    for start in range(0, len(low), rows):
        piece = low[start : start + rows]
        yield start, part.preactivations(piece, held[: len(piece)])


def select(config: TrainConfig, part: Part, x: Float[Tensor, "sample read"], *, guess: float | None = None) -> Found:
    """The entries of a batch.

    Args:
        config: how latents are chosen.
        part: whose.
        x: what is encoded.
        guess: of BatchTopK's threshold.
    """
    n, count = len(x), len(part.b_enc)
    if config.architecture == "topk":
        k = min(config.k, count)
        chosen = [top_k(pre, k) for _, pre in pieces(part, x)]
        values, latents = torch.cat([v for v, _ in chosen]), torch.cat([i for _, i in chosen])
        sample = torch.arange(n, device=x.device).repeat_interleave(k)
        return Found(Active(sample, latents.flatten(), n, count), values.flatten().float())
    if config.architecture in ("batchtopk", "matryoshka"):
        return _batch_top_k(config, part, x, guess)
    return _above(part, x, edge(config, part.extras))


def _above(part: Part, x: Tensor, limit: Tensor | float) -> Found:
    samples, latents, values = [], [], []
    limit = limit.to(part.low) if isinstance(limit, Tensor) else limit
    for start, pre in pieces(part, x):
        sample, latent = (pre > limit).nonzero(as_tuple=True)
        samples.append(sample + start)
        latents.append(latent)
        values.append(pre[sample, latent].float())
    active = Active(torch.cat(samples), torch.cat(latents), len(x), len(part.b_enc))
    return Found(active, torch.cat(values))


def _batch_top_k(config: TrainConfig, part: Part, x: Tensor, guess: float | None) -> Found:
    wanted = min(config.k, len(part.b_enc)) * len(x)
    if guess is None:
        _, first = next(pieces(part, x))
        deep = min(2 * config.k, first.shape[1])
        guess = float(top_k(first, deep)[0].amin(1).float().mean())
    found = _above(part, x, max(guess, 0.0))
    while len(found.pre) < wanted and guess > 0:
        guess = guess / 2 if guess > 1e-3 else 0.0
        found = _above(part, x, guess)
    if len(found.pre) <= wanted:
        least = float(found.pre.min()) if len(found.pre) else 0.0
        return Found(found.active, found.pre, least)
    kept = found.pre.topk(wanted, sorted=False)[1].sort()[0]
    active, pre = found.active, found.pre[kept]
    chosen = Active(active.sample[kept], active.latent[kept], active.n_samples, active.n_latents)
    return Found(chosen, pre, float(pre.min()))
