"""From pre-activations to codes and back, entry by entry: the same formulas serve sparse entries and dense pieces.

Each rule works on tensors of any shape; parameters of a latent come gathered by entry or as a row. Gradients are
written out and equal autograd's of the same loss (with JumpReLU's pseudo-derivatives where the true one is zero or a
spike).

ReLU; JumpReLU with thresholds as plain numbers and a rectangle of `bandwidth` as pseudo-derivative (Rajamanoharan et
al. 2024, arXiv:2407.14435); Gated, whose magnitude path shares the gate's directions, with frozen copies of the
decoder in its auxiliary loss (Rajamanoharan et al. 2024, arXiv:2404.16014). Penalties: L1 (Bricken et al. 2023), tanh
(Anthropic, January 2025), log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tomoscope.features.training.config import TrainConfig

THETA, R_MAG, B_MAG = "theta", "r_mag", "b_mag"
EXTRAS: dict[str, tuple[str, ...]] = {"jumprelu": (THETA,), "gated": (R_MAG, B_MAG)}
"""Parameters of a latent besides encoder row, encoder bias and decoder row."""


@dataclass(frozen=True, eq=False)
class Back:
    """Gradients of entries.

    Attributes:
        row: of the latent's encoder product (x . W_enc).
        bias: of its encoder bias.
        extras: of its other parameters, by name.
    """

    row: Tensor
    bias: Tensor
    extras: dict[str, Tensor]


def edge(config: TrainConfig, latent: Mapping[str, Tensor]) -> Tensor | float:
    """Above which pre-activation an entry has a code or a gradient."""
    return latent[THETA] - config.bandwidth / 2 if config.architecture == "jumprelu" else 0.0


def codes(config: TrainConfig, pre: Tensor, latent: Mapping[str, Tensor]) -> Tensor:
    """The codes of pre-activations (of the gate's, where gated)."""
    if config.architecture == "jumprelu":
        return pre * (pre > latent[THETA])
    if config.architecture == "gated":
        return (pre > 0) * magnitude(pre, latent).clamp(min=0)
    return pre.clamp(min=0)


def magnitude(pre: Tensor, latent: Mapping[str, Tensor]) -> Tensor:
    """Gated: the magnitude path's pre-activation."""
    return (pre - latent["b_enc"]) * latent[R_MAG].exp() + latent[B_MAG]


def back(config: TrainConfig, pre: Tensor, dz: Tensor, dgate: Tensor | None, latent: Mapping[str, Tensor]) -> Back:
    """Gradients from those of the codes (`dz`) and, where gated, of the gate's own path (`dgate`)."""
    if config.architecture == "jumprelu":
        theta = latent[THETA]
        on = dz * (pre > theta)
        near = (pre - theta).abs() < config.bandwidth / 2
        return Back(on, on, {THETA: -(theta / config.bandwidth) * near * dz})
    if config.architecture == "gated":
        assert dgate is not None
        on = pre > 0
        gate = dgate * on
        dm = dz * (on & (magnitude(pre, latent) > 0))
        grown = dm * latent[R_MAG].exp()
        return Back(grown + gate, gate, {R_MAG: grown * (pre - latent["b_enc"]), B_MAG: dm})
    on = dz * (pre > 0)
    return Back(on, on, {})


def step_back(config: TrainConfig, pre: Tensor, latent: Mapping[str, Tensor]) -> Tensor:
    """JumpReLU: the pseudo-gradient by theta of an entry's being active."""
    near = (pre - latent[THETA]).abs() < config.bandwidth / 2
    return near.to(pre) / -config.bandwidth


def penalty(config: TrainConfig, value: Tensor, norm: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Of activations >= 0 and decoder norms: the penalty, its derivative by the activation, and that by the norm."""
    if config.penalty == "l1":
        return value * norm, torch.ones_like(value) * norm, value
    weighed = value * norm
    if config.penalty == "tanh":
        bent = torch.tanh(config.sharpness * weighed)
        slope = config.sharpness * (1 - bent.square())
        return bent, slope * norm, slope * value
    slope = 1 / (config.epsilon + weighed)
    return torch.log1p(weighed / config.epsilon), slope * norm, slope * value
