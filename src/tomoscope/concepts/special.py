"""Probes for special questions: how few examples suffice, how few neurons, and at which tokens.

- few-shot: held-out accuracy of the difference of means (or the logistic probe) after k examples a class, over draws.
- sparse (Gurnee et al. 2023, arXiv:2305.01610): a probe of the k coordinates whose class means differ most; a concept
  that one neuron holds is told by k = 1.
- attention-pooled: softmax attention with one query picks tokens, a linear reader reads their mean; learned together.

How they can mislead: the k coordinates that differ most are not the best k together; in a stream no coordinate is
special, so a sparse probe there says something of outlier dimensions only; attention pooling has more freedom than a
linear probe, and its control task shows how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.linear import Linear, fit
from tomoscope.concepts.measures import right
from tomoscope.concepts.probes import scaling
from tomoscope.errors import DataError


def few_shot(
    x: Float[Tensor, "item width"],
    labels: Int[np.ndarray, " item"],
    *,
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    draws: int = 20,
    method: Literal["means", "logistic"] = "means",
    strength: float = 1e-1,
    n_classes: int = 2,
    seed: int = 0,
) -> dict[int, Float[np.ndarray, " draw"]]:
    """Held-out share right after `size` examples of each class, for each draw of examples; all draws in one fit.

    Sizes that a class has too few items for are left out of what comes back.
    """
    y = np.asarray(labels)
    generator = np.random.default_rng(seed)
    members = [train[y[train] == c] for c in range(n_classes)]
    sizes = [size for size in sizes if size <= min(map(len, members))]
    if not sizes:
        raise DataError("A class has no item to learn from.", remedy="Give more items.")
    keep = torch.zeros(len(sizes), draws, len(y))
    for i, size in enumerate(sizes):
        for rows in members:
            order = rows[np.argsort(generator.random((draws, len(rows))), axis=1)[:, :size]]
            keep[i].scatter_(1, torch.as_tensor(order), 1.0)
    scale = scaling(x[train])
    target = torch.as_tensor(y)
    flat = keep.reshape(-1, len(y))
    fitted = fit(
        scale(x), target.expand(len(flat), -1), n_classes, method=method, weights=flat,
        strengths=torch.full((len(flat),), strength),
    )  # fmt: skip
    hits = right(fitted.scores(scale(x[test])), target[test][:, None].expand(-1, len(flat)), n_classes).mean(0)
    return {size: hits.reshape(len(sizes), draws)[i].numpy() for i, size in enumerate(sizes)}


@dataclass(frozen=True, eq=False)
class Sparse:
    """A probe of few coordinates.

    Attributes:
        k: how many.
        coordinates: [k], which.
        accuracy: on held-out items.
        linear: the reader of raw activations, 0 elsewhere.
    """

    k: int
    coordinates: Int[np.ndarray, " k"]
    accuracy: float
    linear: Linear


def sparse_probe(
    x: Float[Tensor, "item width"],
    labels: Int[np.ndarray, " item"],
    *,
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    strength: float = 1e-2,
) -> list[Sparse]:
    """Logistic probes of the k coordinates that differ most between the two classes, in pooled standard deviations."""
    y = torch.as_tensor(np.asarray(labels))
    scale = scaling(x[train])
    inner, held = scale(x[train]), scale(x[test])
    rank = (inner[y[train] == 1].mean(0) - inner[y[train] == 0].mean(0)).abs().argsort(descending=True)
    found = []
    for k in [count for count in counts if count <= x.shape[1]]:
        chosen = rank[:k]
        fitted = fit(inner[:, chosen], y[None, train], 2, strengths=torch.tensor([strength]))
        accuracy = float(right(fitted.scores(held[:, chosen])[:, 0], y[test], 2).mean())
        weight = torch.zeros(1, x.shape[1], 1).index_copy(1, chosen, fitted.weight)
        raw = scale.raw(Linear(weight, fitted.bias, fitted.steps, fitted.converged))
        found.append(Sparse(k, chosen.numpy(), accuracy, raw))
    return found


@dataclass(frozen=True, eq=False)
class AttentionPooled:
    """A probe that chooses its tokens.

    Attributes:
        query: [width] attention's scores are x . query.
        weight: [width] reads the pooled activation.
        bias: of the score.
    """

    query: Float[Tensor, " width"]
    weight: Float[Tensor, " width"]
    bias: float

    def attention(self, x: Float[Tensor, "item position width"], mask: Float[Tensor, "item position"]) -> Tensor:
        """[item, position], sums to 1 over the tokens of each item."""
        return (x @ self.query).masked_fill(mask == 0, -torch.inf).softmax(-1)

    def score(self, x: Float[Tensor, "item position width"], mask: Float[Tensor, "item position"]) -> Tensor:
        """[item], above 0 for the second class."""
        return (self.attention(x, mask)[..., None] * x).sum(1) @ self.weight + self.bias


def attention_pooled(
    x: Float[Tensor, "item position width"],
    mask: Float[Tensor, "item position"],
    labels: Int[np.ndarray, " item"],
    *,
    train: Int[np.ndarray, " train"],
    strength: float = 1e-3,
    steps: int = 300,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> AttentionPooled:
    """Learn query and reader together by Adam on the training items; starts as the mean over tokens."""
    y = torch.as_tensor(np.asarray(labels))[train].float()
    inner, inside = x[train], mask[train]
    tokens = inner[inside > 0]
    mean, spread = tokens.mean(0), tokens.std(0).clamp(min=1e-6)
    inner = (inner - mean) / spread
    generator = torch.Generator().manual_seed(seed)
    query = (0.01 * torch.randn(x.shape[-1], generator=generator)).requires_grad_(True)
    weight = torch.zeros(x.shape[-1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([query, weight, bias], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            attention = (inner @ query).masked_fill(inside == 0, -torch.inf).softmax(-1)
            score = (attention[..., None] * inner).sum(1) @ weight + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(score, y)
            (loss + strength / 2 * (weight.square().sum() + query.square().sum())).backward()
            optimiser.step()
    # back to raw activations; attention's own constant does not matter, and its weights sum to 1
    raw = weight.detach() / spread
    return AttentionPooled(query.detach() / spread, raw, float(bias.detach() - mean @ raw))
