"""Logistic regression of many problems on the same items, by Newton's method with conjugate gradients, all in step.

Each problem (a labelling, a fold, a penalty) minimises mean log-loss + strength / 2 |w|^2, its bias free. A step solves
the problem's own Hessian roughly by conjugate gradients, more exactly as its gradient falls (truncated Newton; Dembo
and Steihaug 1983), preconditioned by the items' second moments times the problem's mean curvature: in principal axes
that is a division. Problems at rest leave the batch. The products of all problems with the activations are one matrix
product each way, which is where the time of many small fits goes otherwise.

How it can mislead: two classes that are told apart without error have no minimum at strength 0, and the steps end with
`converged` False.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.concepts.principal import Principal

_HALVINGS, _DOUBLINGS = 20, 3
_INNER = 250
"""Most conjugate gradients of one step."""


def logistic(
    items: Principal,
    target: Float[Tensor, "item problem output"],
    strengths: Float[Tensor, " problem"],
    share: Float[Tensor, "item problem"],
    *,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> tuple[Float[Tensor, "problem axis output"], Float[Tensor, "problem output"], int, bool]:
    """Fit every problem.

    Args:
        items: that are shared by all.
        target: 1 and 0; one output is the log-odds of the second of two classes, several are a softmax's.
        strengths: of the penalty.
        share: of each item in a problem's mean; columns sum to 1.
        start: weights and biases to start from, as they are returned; 0 by default.
        tolerance: largest entry of the gradient, in activations of unit mean square.
        max_steps: most Newton steps.

    Returns:
        Weights on the items' coordinates, biases, steps of the slowest problem, and whether all came to rest.
    """
    n, problems, outputs = target.shape
    scale = (items.unit / n).sqrt()  # of an activation
    whole = _Batch(
        items.coordinates / scale, items.squares / scale**2, target.reshape(n, -1), strengths / scale**2,
        share, outputs, tolerance,
    )  # fmt: skip
    weight = whole.x.new_zeros(whole.x.shape[1], problems * outputs)
    bias = weight.new_zeros(problems * outputs)
    if start is not None:
        weight, bias = start[0].permute(1, 0, 2).reshape(len(weight), -1) * scale, start[1].reshape(-1)
    alive, batch, steps, rest = torch.arange(problems), whole, 0, True
    theta, offset = weight.clone(), bias.clone()
    while len(alive):
        going, stuck, theta, offset = batch.step(theta, offset)
        columns = (alive[:, None] * outputs + torch.arange(outputs)).reshape(-1)
        weight[:, columns], bias[columns] = theta, offset
        rest = rest and not bool(stuck.any())
        steps += bool(going.any())
        if steps >= max_steps:
            rest = False
            break
        keep = (going & ~stuck).nonzero()[:, 0]
        if len(keep) < len(alive):
            batch, alive = batch.take(keep), alive[keep]
            mine = (keep[:, None] * outputs + torch.arange(outputs)).reshape(-1)
            theta, offset = theta[:, mine], offset[mine]
    bias = bias.reshape(problems, outputs)
    if outputs > 1:  # a softmax does not know what all biases have in common
        bias = bias - bias.mean(1, keepdim=True)
    return weight.reshape(-1, problems, outputs).permute(1, 0, 2) / scale, bias, steps, rest


class _Batch:
    """The problems that still move: columns are [problem, output]."""

    def __init__(
        self, x: Tensor, squares: Tensor, target: Tensor, strengths: Tensor, share: Tensor, outputs: int,
        tolerance: float,
    ) -> None:  # fmt: skip
        self.x, self.squares, self.target, self.strengths = x, squares, target, strengths
        self.share, self.outputs, self.tolerance = share, outputs, tolerance
        self.wide = share if outputs == 1 else share.repeat_interleave(outputs, 1)
        self.penalty = strengths.repeat_interleave(outputs)

    def take(self, keep: Tensor) -> _Batch:
        """Some problems."""
        columns = (keep[:, None] * self.outputs + torch.arange(self.outputs)).reshape(-1)
        return _Batch(
            self.x, self.squares, self.target[:, columns], self.strengths[keep], self.share[:, keep], self.outputs,
            self.tolerance,
        )  # fmt: skip

    def by_problem(self, columns: Tensor) -> Tensor:
        """[.., column] summed to [.., problem]."""
        return columns if self.outputs == 1 else columns.unflatten(-1, (-1, self.outputs)).sum(-1)

    def by_column(self, problems: Tensor) -> Tensor:
        """[.., problem] repeated to [.., column]."""
        return problems if self.outputs == 1 else problems.repeat_interleave(self.outputs, -1)

    def loss(self, z: Tensor, squares: Tensor) -> Tensor:
        """[problem], with the weights' squared length."""
        if self.outputs == 1:
            each = torch.nn.functional.softplus(z) - z * self.target
        else:
            each = z.unflatten(-1, (-1, self.outputs)).logsumexp(-1) - self.by_problem(z * self.target)
        return (each * self.share).sum(0) + self.strengths / 2 * squares

    def probability(self, z: Tensor) -> Tensor:
        """Of each column's class."""
        return z.sigmoid() if self.outputs == 1 else z.unflatten(-1, (-1, self.outputs)).softmax(-1).flatten(-2)

    def step(self, theta: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One Newton step: [problem] whether it moved, whether it can't any more; the new weights and biases."""
        z = self.x @ theta + bias
        p = self.probability(z)
        rest = (p - self.target) * self.wide
        gradient, slope = self.x.T @ rest + self.penalty * theta, rest.sum(0)
        size = torch.maximum(gradient.abs().amax(0), slope.abs())
        size = size if self.outputs == 1 else size.unflatten(-1, (-1, self.outputs)).amax(-1)
        going = size > self.tolerance
        if not bool(going.any()):
            return going, torch.zeros_like(going), theta, bias
        move, turn, change = self.newton(p, gradient, slope, size, going)
        length = self.along(z, change, theta, move, (gradient * move).sum(0) + slope * turn, going)
        wide = self.by_column(length)
        return going, going & (length == 0), theta + wide * move, bias + wide * turn

    def along(self, z: Tensor, change: Tensor, theta: Tensor, move: Tensor, downhill: Tensor, going: Tensor) -> Tensor:
        """[problem] how far to go: doubled while that helps (far off, Newton's step is short), or halved."""
        parts = [self.by_problem((a * b).sum(0)) for a, b in ((theta, theta), (theta, move), (move, move))]
        downhill = self.by_problem(downhill)

        def value(length: Tensor) -> Tensor:
            at = z + self.by_column(length) * change
            return self.loss(at, parts[0] + 2 * length * parts[1] + length.square() * parts[2])

        length = going.to(theta)
        start, new = value(torch.zeros_like(length)), value(length)
        slack = (1e-6 if theta.dtype == torch.float32 else 1e-13) * start.abs()
        good = ~going | (new <= start + 1e-4 * length * downhill + slack)
        growing = going & good
        for _ in range(_DOUBLINGS):
            if not bool(growing.any()):
                break
            further = torch.where(growing, 2 * length, length)
            tried = value(further)
            growing = growing & (tried < new)
            length, new = torch.where(growing, further, length), torch.where(growing, tried, new)
        for _ in range(_HALVINGS):
            if bool(good.all()):
                return length
            length = torch.where(good, length, length / 2)
            good = good | (value(length) <= start + 1e-4 * length * downhill + slack)
        return torch.where(good, length, torch.zeros_like(length))  # no length helps: the floor of this arithmetic

    def newton(
        self, p: Tensor, gradient: Tensor, slope: Tensor, size: Tensor, going: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step of weights and biases, and what it does to the outputs."""
        curve = p * (1 - p) * self.wide
        total = curve.sum(0).clamp(min=1e-12)
        metric = self.squares[:, None] / len(self.x) * total + self.penalty
        metric = torch.where(metric > 0, metric, torch.ones_like(metric))
        move, turn = torch.zeros_like(gradient), torch.zeros_like(slope)
        change = torch.zeros_like(p)
        left, left_bias = -gradient, -slope
        towards, towards_bias = left / metric, left_bias / total
        length = self.by_problem((left * towards).sum(0) + left_bias * towards_bias)
        # squares: superlinear as the gradient falls, and no further than the end
        aim = torch.maximum(size.clamp(max=0.0625), (self.tolerance / size).square().clamp(max=1) / 4) * length
        active = going
        for _ in range(min(_INNER, 2 * len(self.squares) + 2)):
            seen = self.x @ towards + towards_bias
            if self.outputs == 1:
                felt = curve * seen
            else:
                felt = p * self.wide * (seen - self.by_column(self.by_problem(p * seen)))
            bent, bent_bias = self.x.T @ felt + self.penalty * towards, felt.sum(0)
            along = self.by_problem((towards * bent).sum(0) + towards_bias * bent_bias)
            active = active & (along > 0)
            pace = self.by_column(torch.where(active, length / along.clamp(min=1e-38), torch.zeros_like(along)))
            move, turn, change = move + pace * towards, turn + pace * towards_bias, change + pace * seen
            left, left_bias = left - pace * bent, left_bias - pace * bent_bias
            step, step_bias = left / metric, left_bias / total
            new = self.by_problem((left * step).sum(0) + left_bias * step_bias)
            active = active & (new > aim)
            if not bool(active.any()):
                break
            ratio = self.by_column(new / length.clamp(min=1e-38))
            length = new
            towards, towards_bias = step + ratio * towards, step_bias + ratio * towards_bias
        return move, turn, change
