"""A norm as a linear map: y = weight x (x or x - mean(x)) x scale + bias, its scale frozen at what a prompt gave.

Weight, bias and centring are the module's own and are found by giving it vectors whose norm is known, so that no family
need be known (RMS norm, layer norm, Gemma's 1 + w, without weights). The scale of each position is what the module did
to the prompt. How it can mislead: a norm that depends on its input in another way is refused, not approximated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.errors import UnavailableSiteError

LOUD = 1e3
"""Length of a probe's coordinates: an epsilon under the root is then below rounding."""


@dataclass(frozen=True, eq=False)
class NormWeights:
    """What a norm does beside scaling each position.

    Attributes:
        weight: [d_model].
        bias: [d_model].
        centred: whether the mean is removed (layer norm).
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    def at(self, x: Float[Tensor, "position d_model"], y: Float[Tensor, "position d_model"]) -> FrozenNorm:
        """The norm frozen at the scale with which it made y of x."""
        weight, bias = self.weight.to(x), self.bias.to(x)
        shaped = weight * (x - x.mean(-1, keepdim=True) if self.centred else x)
        least = torch.finfo(x.dtype).tiny
        scale = ((y - bias) * shaped).sum(-1) / shaped.square().sum(-1).clamp(min=least)
        return FrozenNorm(weight, bias, self.centred, scale)

    def fold(self, directions: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What directions in the norm's output read from the stream before it, up to the norm's scale."""
        out = directions * self.weight.to(directions)
        return out - out.mean(-1, keepdim=True) if self.centred else out


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose scale is what a prompt gave; see the module's docstring.

    Attributes:
        weight: [d_model].
        bias: [d_model].
        centred: whether the mean is removed.
        scale: [position].
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    scale: Float[Tensor, " position"]

    def linear(self, x: Float[Tensor, "position d_model"]) -> Float[Tensor, "position d_model"]:
        """The norm without its bias."""
        shaped = x - x.mean(-1, keepdim=True) if self.centred else x
        return shaped * self.weight * self.scale[:, None]

    def fold(self, directions: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What directions in the norm's output read from the stream before it, up to the position's scale."""
        return NormWeights(self.weight, self.bias, self.centred).fold(directions)

    @property
    def unit(self) -> FrozenNorm:
        """The norm before its own weights where it is an RMS norm; a layer norm as it is."""
        if self.centred:
            return self
        return FrozenNorm(torch.ones_like(self.weight), torch.zeros_like(self.bias), False, self.scale)


def no_norm(like: Float[Tensor, "position d_model"]) -> FrozenNorm:
    """The identity, for what reads the stream itself."""
    width = like.new_ones(like.shape[1])
    return FrozenNorm(width, torch.zeros_like(width), False, like.new_ones(len(like)))


@torch.no_grad()
def norm_weights(module: nn.Module, d_model: int, *, name: str = "") -> NormWeights:
    """Weight, bias and centring of a norm module, found by running a copy of it on known vectors.

    Raises:
        UnavailableSiteError: the module is neither an RMS norm nor a layer norm.
    """
    probe = copy.deepcopy(module).double().cpu()
    generator = torch.Generator().manual_seed(0)
    x = LOUD * torch.randn(3, d_model, dtype=torch.float64, generator=generator)
    try:
        bias, y = probe(torch.zeros_like(x[:1]))[0].double(), probe(x).double()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnavailableSiteError(f"{name or 'A norm'} can't be run by itself ({error}).") from error
    for centred in (False, True):
        base = x - x.mean(-1, keepdim=True) if centred else x
        unit = base / base.square().mean(-1, keepdim=True).sqrt()
        weight = ((y - bias) * unit).sum(0) / unit.square().sum(0)
        if float((weight * unit + bias - y).abs().max()) < 1e-4 * float(y.abs().max()):
            return NormWeights(_exact(module, weight), _exact(module, bias), centred)
    raise UnavailableSiteError(
        f"{name or 'A norm'} is neither an RMS norm nor a layer norm, so it can't be frozen.",
        remedy="An attribution graph needs every norm to be linear once its scale is fixed.",
    )


def _exact(module: nn.Module, found: Tensor) -> Tensor:
    """The module's own parameter where it is what was found up to rounding; norms compute in float32 inside."""
    for parameter in module.parameters(recurse=False):
        own = parameter.detach().double().cpu().reshape(-1)
        for value in (own, own + 1.0):
            if value.shape == found.shape and torch.allclose(value, found, rtol=1e-4, atol=1e-5):
                return value
    # a norm without weights gives ones and zeros
    return found.round() if torch.allclose(found, found.round(), atol=1e-5) else found
