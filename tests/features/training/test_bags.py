"""Sums over entries against the dense products they stand for."""

from __future__ import annotations

import pytest
import torch

from tomoscope.features.training.bags import Active, ByLatent, bag, pair_products, stable_order, starts, sums


@pytest.mark.parametrize("latents", [7, 70_000])
def test_bags_are_products_with_the_dense_matrix(latents: int) -> None:
    draw = torch.Generator().manual_seed(0)
    n, width, entries = 9, 5, 40
    sample = torch.randint(0, n, (entries,), generator=draw).sort()[0]
    latent = torch.randint(0, latents, (entries,), generator=draw)
    weight = torch.randn(entries, generator=draw)
    table, rows = torch.randn(latents, width, generator=draw), torch.randn(n, width, generator=draw)
    active = Active(sample, latent, n, latents)
    dense = torch.zeros(n, latents).index_put_((sample, latent), weight, accumulate=True)
    torch.testing.assert_close(bag(latent, table, starts(sample, n), weight), dense @ table)
    torch.testing.assert_close(pair_products(rows, table, active), (rows[sample] * table[latent]).sum(1))
    torch.testing.assert_close(ByLatent.of(active).rows(rows, weight), dense.T @ rows)
    torch.testing.assert_close(sums(active, weight), dense.sum(0))
    assert torch.equal(stable_order(latent, latents), latent.sort(stable=True)[1])
