"""Next-token cross-entropy of a tied output layer without keeping the logits: chunks of them are made, used, dropped.

The gradient is computed in the forward pass (softmax minus one-hot, times the weights), so that [token, vocabulary]
arrays never leave the cache and no autograd runs through them. Equal to `cross_entropy(hidden @ weight.T)` and its
gradients up to rounding; a test compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, dtype: torch.dtype
    ) -> Tensor:
        small, low = weight.to(dtype), hidden.to(dtype)
        total = torch.zeros((), dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(low), torch.zeros_like(weight)
        for start in range(0, len(low), CHUNK):
            rows, goal = low[start : start + CHUNK], targets[start : start + CHUNK, None]
            share = counts[start : start + CHUNK, None]
            logits = (rows @ small.T).float()
            peak = logits.amax(-1, keepdim=True)
            picked = logits.gather(1, goal)
            exponents = logits.sub_(peak).exp_()
            sums = exponents.sum(-1, keepdim=True)
            total += (share * (sums.log() + peak - picked)).sum()
            gradient = exponents.mul_(share / sums)
            gradient.scatter_add_(1, goal, -share)
            gradient = gradient.to(dtype)
            d_hidden[start : start + CHUNK] = gradient @ small
            d_weight += gradient.T @ rows
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * upstream[0], d_weight * upstream[0], None, None, None


def tied_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, counts: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """Mean cross-entropy in nats.

    Args:
        hidden: [token, d_model], after the final norm.
        weight: [vocabulary, d_model], the embedding that is also the output layer.
        targets: [token], the next token's id.
        counts: [token], how much each token counts; all alike where not given.
        dtype: of the products; sums and the softmax are in float32.
    """
    counts = torch.ones(len(targets)) if counts is None else counts
    return _TiedCrossEntropy.apply(hidden, weight, targets, counts / counts.sum(), dtype)
