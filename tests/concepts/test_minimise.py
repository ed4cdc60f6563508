"""L-BFGS of many problems in step: each finds its own minimum."""

from __future__ import annotations

import torch

from tomoscope.concepts.minimise import minimise


def test_quadratics_of_different_curvature():
    generator = torch.Generator().manual_seed(0)
    curves = torch.rand(5, 7, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 5).double()[:, None]
    curves += 1e-2
    aim = torch.randn(5, 7, generator=generator, dtype=torch.float64)

    def loss(z, theta):
        return (curves * (theta - aim).square()).sum(1) / 2

    def slope(z, theta):
        return curves * (theta - aim)

    theta, steps, rest = minimise(
        torch.zeros_like(aim), lambda t: t[None], loss, slope, lambda g: g, tolerance=1e-10, max_steps=500
    )
    assert rest
    assert steps < 200
    torch.testing.assert_close(theta, aim, rtol=1e-6, atol=1e-6)
