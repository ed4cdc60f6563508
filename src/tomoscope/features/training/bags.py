"""Sums over the few latents that are active: decoding, and every gradient, without a dense [sample, latent] matrix.

`Active` lists the entries (sample, latent) of a batch. A decoding is a bag over each sample's latents; the gradients of
encoder and decoder rows are bags over each latent's samples, for which the entries are put in the order of latents once
(a radix sort: indices under 65,536 are sorted as 16 bits). The cost of all is entries x width, where the dense products
of the usual training step are samples x latents x width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, eq=False)
class Active:
    """Entries of a sparse [sample, latent] matrix, in the order of samples.

    Attributes:
        sample: [entry], rising.
        latent: [entry].
        n_samples: rows of the matrix.
        n_latents: columns.
    """

    sample: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    n_samples: int
    n_latents: int

    def __len__(self) -> int:
        return len(self.latent)


def starts(groups: Int[Tensor, " entry"], count: int) -> Int[Tensor, " group"]:
    """Where each group's entries begin, for entries in the order of groups."""
    sizes = torch.bincount(groups, minlength=count)
    return sizes.cumsum(0) - sizes


def bag(
    row: Int[Tensor, " entry"], table: Float[Tensor, "row width"], start: Int[Tensor, " group"], weight: Tensor
) -> Float[Tensor, "group width"]:
    """For each group of entries the sum of weight x table[row]; entries stand in the order of groups.

    Sums are made in float32; a bfloat16 table halves what has to be read, and rounds weights and sums.
    """
    return embedding_bag(row, table, start, mode="sum", per_sample_weights=weight.to(table))


def pair_products(
    left: Float[Tensor, "sample width"], right: Float[Tensor, "latent width"], active: Active
) -> Float[Tensor, " entry"]:
    """left[sample] . right[latent] of each entry."""
    start = starts(active.sample, active.n_samples)
    none = torch.empty(0, dtype=torch.long, device=left.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, active.latent, start, none, 0, -1)


def stable_order(keys: Int[Tensor, " entry"], count: int) -> Int[Tensor, " entry"]:
    """The stable order of keys under `count`: a radix sort of 16 bits at a time."""
    if keys.device.type != "cpu":
        return keys.sort(stable=True)[1]
    numbers = keys.numpy()
    order = np.argsort((numbers & 0xFFFF).astype(np.uint16), kind="stable")
    if count > 1 << 16:
        order = order[np.argsort((numbers[order] >> 16).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


@dataclass(frozen=True, eq=False)
class ByLatent:
    """The same entries in the order of latents.

    Attributes:
        order: [entry], from this order to that of samples.
        sample: [entry].
        start: [latent], where each latent's entries begin.
    """

    order: Int[Tensor, " entry"]
    sample: Int[Tensor, " entry"]
    start: Int[Tensor, " latent"]

    @classmethod
    def of(cls, active: Active) -> ByLatent:
        """Sort once."""
        order = stable_order(active.latent, active.n_latents)
        return cls(order, active.sample[order], starts(active.latent, active.n_latents))

    def rows(self, table: Float[Tensor, "sample width"], weight: Float[Tensor, " entry"]) -> Tensor:
        """[latent, width]: for each latent the sum of weight x table[sample], in float32 whatever the table's type."""
        return bag(self.sample, table, self.start, weight[self.order]).float()


def sums(active: Active, weight: Float[Tensor, " entry"]) -> Float[Tensor, " latent"]:
    """For each latent the sum of its entries' weights."""
    return torch.bincount(active.latent, weights=weight, minlength=active.n_latents).to(weight.dtype)
