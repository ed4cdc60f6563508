"""L-BFGS for many problems in step, of functions of linear outputs (Nocedal 1980, Liu and Nocedal 1989).

Each problem has its own step length (halved until the function falls enough) and its own end; all share the products
with the data. How it can mislead: of a function with several minima it finds one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MEMORY = 10  # pairs that are kept
_BISECTIONS = 20


def minimise(theta, forward, loss, slope, precondition, tolerance: float, max_steps: int):
    """L-BFGS for many problems in step, of functions of linear outputs.

    Args:
        theta: [problem, ...] the start.
        forward: theta -> outputs z, linear, with the problem on z's axis 1.
        loss: (z, theta) -> [problem].
        slope: (z, theta) -> gradient like theta.
        precondition: gradient -> the inverse of a fixed bound of the Hessian times it.
        tolerance: largest entry of the gradient at which a problem rests.
        max_steps: most iterations.

    Returns:
        theta, the iterations taken, and whether all problems came to rest.
    """
    z = forward(theta)
    value, gradient = loss(z, theta), slope(z, theta)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    dims = tuple(range(1, theta.dim()))
    wide = (slice(None), *[None] * (theta.dim() - 1))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims)

    for step in range(max_steps):
        moving = gradient.abs().amax(dims) > tolerance
        if not bool(moving.any()):
            return theta, step, True
        direction = gradient.clone()
        alphas = []
        for s, y, rho in reversed(pairs):
            alpha = rho * inner(s, direction)
            direction -= alpha[wide] * y
            alphas.append(alpha)
        direction = precondition(direction)
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            direction += (alpha - rho * inner(y, direction))[wide] * s
        downhill = inner(direction, gradient)
        poor = downhill <= 0  # rounding has spoilt the memory: the plain bound's step is always downhill
        if bool(poor.any()):
            direction = torch.where(poor[wide], precondition(gradient), direction)
            downhill = inner(direction, gradient)
        change = forward(direction)
        length = moving.to(theta)
        across = (None, slice(None), *[None] * (z.dim() - 2))
        slack = 1e-6 * value.abs() if theta.dtype == torch.float32 else 1e-13 * value.abs()
        for _ in range(_BISECTIONS):
            new_theta = theta - length[wide] * direction
            new_z = z - length[across] * change
            new_value = loss(new_z, new_theta)
            bad = moving & ~(new_value <= value - 1e-4 * length * downhill + slack)
            if not bool(bad.any()):
                break
            length = torch.where(bad, length / 2, length)
        else:  # no length helps: the floor of this arithmetic
            length = torch.where(bad, torch.zeros_like(length), length)
            new_theta, new_z = theta - length[wide] * direction, z - length[across] * change
            new_value = loss(new_z, new_theta)
            if not bool((length > 0).any()):
                return theta, step, False
        new_gradient = slope(new_z, new_theta)
        s, y = new_theta - theta, new_gradient - gradient
        curved = inner(s, y)
        rho = torch.where(curved > 1e-12 * inner(y, y).clamp(min=1e-30), 1 / curved.clamp(min=1e-30), 0 * curved)
        pairs = [*pairs[-_MEMORY + 1 :], (s, y, rho)]
        theta, z, value, gradient = new_theta, new_z, new_value, new_gradient
    return theta, max_steps, not bool((gradient.abs().amax(dims) > tolerance).any())
