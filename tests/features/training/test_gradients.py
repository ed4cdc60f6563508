"""Every gradient against autograd's of the same loss, written as a person would, for every architecture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.gradients import Step, compute
from tomoscope.features.training.parameters import Layout, Parameters

B, D, F = 300, 12, 64
CASES = {
    "topk": {"architecture": "topk", "k": 5},
    "topk aux": {"architecture": "topk", "k": 5, "auxk": 4},
    "topk aux all": {"architecture": "topk", "k": 5, "auxk": 40},
    "topk not centred": {"architecture": "topk", "k": 5, "centred": False},
    "batchtopk": {"architecture": "batchtopk", "k": 5},
    "matryoshka": {"architecture": "matryoshka", "k": 5, "widths": (8, 24, F)},
    "relu l1": {"architecture": "relu"},
    "relu l1 free": {"architecture": "relu", "decoder": "free"},
    "relu tanh free": {"architecture": "relu", "sparsity": "tanh", "decoder": "free"},
    "relu log free": {"architecture": "relu", "sparsity": "log", "decoder": "free"},
    "gated": {"architecture": "gated"},
    "gated free": {"architecture": "gated", "decoder": "free"},
    "jumprelu": {"architecture": "jumprelu", "threshold": 0.4, "bandwidth": 0.3},
    "jumprelu target": {"architecture": "jumprelu", "threshold": 0.4, "bandwidth": 0.3, "target_l0": 6.0},
    "jumprelu tanh": {"architecture": "jumprelu", "threshold": 0.4, "bandwidth": 0.3, "sparsity": "tanh"},
    "transcoder": {"architecture": "topk", "k": 5, "writes": ("out",)},
    "skip": {"architecture": "topk", "k": 5, "writes": ("out",), "skip": True},
    "relu skip": {"architecture": "relu", "writes": ("out",), "skip": True, "decoder": "free"},
    "crosscoder": {"architecture": "relu", "reads": ("a", "b"), "decoder": "free"},
    "cross-layer": {"architecture": "topk", "k": 3, "reads": ("a", "b"), "writes": ("c", "d"), "cross_layer": True},
    "cross-layer jump": {
        "architecture": "jumprelu", "threshold": 0.4, "bandwidth": 0.3, "reads": ("a", "b"), "writes": ("c", "d"),
        "cross_layer": True, "sparsity": "tanh", "decoder": "free",
    },
}  # fmt: skip
MANY = ("relu", "gated", "jumprelu")


def made(options: dict) -> tuple[Parameters, Tensor, Tensor]:
    config = TrainConfig(**{"reads": ("x",), "latents": F, "precision": "float32", "batch": B, **options})
    widths = {"x": D, "out": 10, "a": D, "b": 9, "c": 8, "d": 7}
    parameters = Parameters.make(config, Layout.of(config, widths))
    draw = torch.Generator().manual_seed(3)
    for name, value in parameters.named().items():
        noise = torch.randn(value.shape, generator=draw) * 0.2
        value += noise.abs() if name.startswith("theta") else noise
    parameters.settle()
    x = torch.randn(B, sum(parameters.layout.reads), generator=draw)
    y = torch.randn(B, sum(parameters.layout.writes), generator=draw) if config.transcoder else x
    return parameters, x, y


class Jump(torch.autograd.Function):
    """JumpReLU with its pseudo-derivative, as its paper writes it."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, up: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, theta = ctx.saved_tensors
        window = ((pre - theta) / ctx.width).abs() < 0.5
        return up * (pre > theta), (-theta / ctx.width * window * up).sum(0), None


class Count(torch.autograd.Function):
    """The step function with its pseudo-derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return (pre > theta).to(pre)

    @staticmethod
    def backward(ctx, up: Tensor) -> tuple[None, Tensor, None]:
        pre, theta = ctx.saved_tensors
        return None, (-(((pre - theta) / ctx.width).abs() < 0.5).to(pre) / ctx.width * up).sum(0), None


def plain_loss(parameters: Parameters, x: Tensor, y: Tensor, pressure: float, dead: list[Tensor]) -> tuple:
    """The loss with dense tensors and autograd; gives the losses by name and the leaves."""
    config = parameters.config
    leaf = {name: value.clone().requires_grad_() for name, value in parameters.named().items()}
    centred = x - leaf["b_dec"] if config.is_centred else x
    total, out, aux_of, losses = 0.0, leaf["b_dec"].expand(len(x), -1), [], {}
    for i, part in enumerate(parameters.parts):
        W_enc, W_dec, b = (leaf[f"{name}.{i}"] for name in ("W_enc", "W_dec", "b_enc"))
        product = centred[:, part.read] @ W_enc.T
        pre = product + b
        if config.architecture == "topk":
            best, place = pre.topk(config.k)
            z = torch.zeros_like(pre).scatter(1, place, best.relu())
        elif config.architecture in ("batchtopk", "matryoshka"):
            least = pre.relu().flatten().topk(config.k * len(x))[0][-1]
            z = torch.where(pre >= least, pre, 0).relu()
        elif config.architecture == "jumprelu":
            z = Jump.apply(pre, leaf[f"theta.{i}"], config.bandwidth)
        elif config.architecture == "gated":
            z = (pre > 0) * (product * leaf[f"r_mag.{i}"].exp() + leaf[f"b_mag.{i}"]).relu()
        else:
            z = pre.relu()
        norms = sum(block.norm(dim=1) for block in W_dec.split(part.blocks, 1)) if config.decoder == "free" else 1.0
        value = (pre.relu() if config.architecture == "gated" else z) * norms
        if config.penalty == "l1":
            cost = value
        elif config.penalty == "tanh":
            cost = torch.tanh(config.sharpness * value)
        elif config.penalty == "log":
            cost = torch.log(1 + value / config.epsilon)
        elif config.penalty == "step":
            l0 = Count.apply(pre, leaf[f"theta.{i}"], config.bandwidth).sum() / len(x)
            off = l0 if config.target_l0 is None else (l0 / config.target_l0 - 1) ** 2
            losses["penalty"] = losses.get("penalty", 0) + pressure * off
        if config.penalty in ("l1", "tanh", "log"):
            losses["penalty"] = losses.get("penalty", 0) + pressure * cost.sum() / len(x)
        if config.architecture == "gated":
            via = pre.relu() @ W_dec.detach() + leaf["b_dec"].detach()
            losses["auxiliary"] = (via - y).square().sum(1).mean()
        if config.architecture == "matryoshka":
            nested = [z[:, :w] @ W_dec[:w] + leaf["b_dec"] for w in config.widths]
            losses["reconstruction"] = sum((one - y).square().sum(1).mean() for one in nested) / len(nested)
        padded = torch.zeros(len(x), y.shape[1])
        out = out + torch.cat([padded[:, : part.write.start], z @ W_dec], 1)
        aux_of.append((pre, W_dec))
    if config.skip:
        out = out + x @ leaf["W_skip"].T
    error = (y - out).detach()
    losses.setdefault("reconstruction", (out - y).square().sum(1).mean())
    for (pre, W_dec), mask, part in zip(aux_of, dead, parameters.parts, strict=False):
        which = mask.nonzero()[:, 0]
        k = min(config.auxk or 0, len(which))
        best, place = pre[:, which].topk(k)
        chosen = torch.zeros(len(x), len(which)).scatter(1, place, best.relu())
        share = config.auxk_coefficient * min(1.0, len(which) / (config.auxk or 1))
        losses["auxiliary"] = share * (error[:, part.write] - chosen @ W_dec[which]).square().sum(1).mean()
    total = sum(losses.values())
    total.backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}, {
        name: value.grad for name, value in leaf.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_autograds(name: str) -> None:
    options = CASES[name]
    parameters, x, y = made(options)
    dead = [torch.arange(F) % 3 == 0] if options.get("auxk") else []
    losses, expected = plain_loss(parameters, x, y, 0.7, dead)
    ways = [False, True] if options["architecture"] in MANY else [False]
    for dense in ways:
        step = compute(parameters, x, y, pressure=0.7, dense=dense, dead=dead)
        compare(step, losses, expected)


def compare(step: Step, losses: dict[str, float], expected: dict[str, Tensor | None]) -> None:
    assert step.losses == pytest.approx(losses, rel=1e-5)
    assert step.gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        mine = step.gradients[parameter]
        gradient = torch.zeros_like(mine) if gradient is None else gradient
        scale = float(gradient.abs().max())
        assert scale > 0, parameter
        assert float((mine - gradient).abs().max()) <= 1e-6 * max(scale, 1), parameter


def test_batchtopk_is_exact_whatever_the_guess() -> None:
    parameters, x, y = made(CASES["batchtopk"])
    whole = compute(parameters, x, y)
    for guess in (0.0, 0.5, 2.0, 50.0):
        other = compute(parameters, x, y, guesses=[guess])
        assert other.entries == whole.entries == B * 5
        assert other.thresholds == whole.thresholds
        assert torch.equal(other.gradients["W_enc.0"], whole.gradients["W_enc.0"])
    assert math.isfinite(whole.thresholds[0])


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "gated", "transcoder"])
def test_half_precision_rounds_and_no_more(name: str) -> None:
    whole, x, y = made(CASES[name])
    half, _, _ = made(CASES[name] | {"precision": "bfloat16"})
    exact, rounded = compute(whole, x, y, pressure=0.7), compute(half, x, y, pressure=0.7)
    for parameter, gradient in exact.gradients.items():
        lost = float((rounded.gradients[parameter] - gradient).norm() / gradient.norm())
        assert rounded.gradients[parameter].dtype == torch.float32
        assert lost < 0.1, parameter  # entries at the edge of the k chosen change, too
