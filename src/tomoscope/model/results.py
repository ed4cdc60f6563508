"""What a call of a model gives back: activations by site name, with the names of their axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import UnknownSiteError, nearest
from tomoscope.model.batch import Batch
from tomoscope.model.sites import Site


class Activations(Mapping[str, Tensor]):
    """Values by site name.

        acts["layer.3.resid_post"]            a tensor; acts.axes["layer.3.resid_post"] names its axes
        acts.stack("layer.*.resid_post")      a tensor with a new leading layer axis
        acts.mask                             [batch, position], False at padding

    At padded positions the values are what the model computed there, and mean nothing: use `mask`.
    """

    def __init__(self, values: Mapping[str, Tensor], axes: Mapping[str, tuple[str, ...]], batch: Batch) -> None:
        self._values, self.axes, self.batch = dict(values), dict(axes), batch

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise UnknownSiteError(f"{name!r} was not read.", remedy=nearest(name, self._values))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def mask(self) -> Tensor:
        """[batch, position], True at tokens."""
        return self.batch.mask

    def stack(self, pattern: str) -> Tensor:
        """Stack the read sites that match a pattern ("layer.*.attn.z") along a new leading axis, in layer order."""
        names = [name for name in self._values if fnmatchcase(name, pattern.replace("[", "[[]"))]
        if not names:
            raise UnknownSiteError(f"No site that was read matches {pattern!r}.", remedy=nearest(pattern, self._values))
        return torch.stack([self._values[name] for name in names])

    def __repr__(self) -> str:
        inner = ", ".join(f"{name} {list(value.shape)}" for name, value in list(self._values.items())[:4])
        return f"Activations({inner}{', ...' if len(self) > 4 else ''})"


def join(parts: Sequence[Activations], batch: Batch) -> Activations:
    """Activations of the rows of one batch, computed piece by piece, put together."""
    if len(parts) == 1:
        return Activations(dict(parts[0]), parts[0].axes, batch)
    return Activations({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, parts[0].axes, batch)


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Attributes:
        logits: [batch, position, vocab] (classifiers: [batch, class]).
        activations: the sites that were asked for.
        batch: the padded inputs.
    """

    logits: Float[Tensor, "batch ..."]
    activations: Activations
    batch: Batch


@dataclass(frozen=True)
class Gradients:
    """Gradients of the sum over the batch of a metric.

    Attributes:
        gradients: d metric / d value, by site, with the site's axes.
        values: the sites' values in the same forward.
        metric: [batch].
    """

    gradients: Activations
    values: Activations
    metric: Float[Tensor, " batch"]


def read_axes(site: Site, single: bool, value: Tensor) -> tuple[str, ...]:
    """Names of the axes of what a read returns, after the selection of heads and positions."""
    names = list(site.axes)
    drop = [site.head_axis] if len(site.heads) == 1 else []
    drop += [site.position_axis] if single else []
    named = tuple(name for i, name in enumerate(names) if i not in drop)
    return named if len(named) == value.dim() else (*named, *(f"axis{i}" for i in range(len(named), value.dim())))
