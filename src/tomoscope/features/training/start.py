"""Where training starts: the scale of the inputs, b_dec at the geometric median, thresholds at the target's quantile.

b_dec at the median or mean of what is written is what most keeps latents alive: a large mean is otherwise an offset
that every latent's pre-activation carries, and those on its wrong side never fire. The geometric median (Weiszfeld
1937; Bricken et al. 2023) minds a few massive activations less than the mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.activations import Moments
from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.parameters import Parameters
from tomoscope.features.training.rules import THETA

SAMPLE = 16_384
"""Rows that starting values are taken from."""


def scales(config: TrainConfig, moments: Mapping[str, Moments]) -> dict[str, float]:
    """By site, what inputs are multiplied by so that their mean norm is the root of their width; 1 without it."""
    sites = dict.fromkeys((*config.reads, *config.targets))
    if not config.normalise:
        return dict.fromkeys(sites, 1.0)
    return {s: len(moments[s].mean) ** 0.5 / moments[s].mean_norm if moments[s].mean_norm else 1.0 for s in sites}


def geometric_median(
    rows: Float[Tensor, "row width"], *, steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " width"]:
    """The point whose summed distance to all rows is least, by Weiszfeld's iteration."""
    wide = rows.double()
    point = wide.mean(0)
    for _ in range(steps):
        weight = 1 / (wide - point).norm(dim=1).clamp(min=1e-12)
        moved = (weight[:, None] * wide).sum(0) / weight.sum()
        done = float((moved - point).norm()) <= tolerance * float(point.norm().clamp(min=1e-12))
        point = moved
        if done:
            break
    return point.to(rows)


@torch.no_grad()
def begin(parameters: Parameters, x: Float[Tensor, "row read"], y: Float[Tensor, "row written"]) -> None:
    """Set what starts from data: b_dec, and JumpReLU's thresholds where there is a target."""
    config = parameters.config
    parameters.b_dec.copy_(geometric_median(y[:SAMPLE]))
    centred = x - parameters.b_dec if config.is_centred else x
    for part in parameters.parts:
        if config.is_centred:
            continue
        # without the input's centring its mean would tell latents apart at the start: it is taken off their bias
        part.b_enc.copy_(-(part.W_enc @ x[:, part.read].mean(0)))
    if config.target_l0 is None:
        return
    share = 1 - config.target_l0 / config.latents
    for part in parameters.parts:
        rows = centred[:2048, part.read]
        for first in range(0, config.latents, 1024):
            piece = slice(first, first + 1024)
            pre = rows @ part.W_enc[piece].T + part.b_enc[piece]
            place = min(len(rows) - 1, int(share * len(rows)))
            part.extras[THETA][piece] = pre.sort(dim=0)[0][place].clamp(min=config.bandwidth)
