"""A concept's direction: one value that a probe reads, steering writes and erasure removes.

    direction.score(x)                        x . vector + bias: above 0 where the probe says the concept is there
    direction.write(2.0)                      an edit that adds 2 x `shift`
    direction.erase()                         an edit that takes the concept's part out, leaving the mean where it was

What reads best is not what writes best: a probe that has seen the covariance turns away from loud directions that have
nothing to do with the concept (Marks and Tegmark 2023, arXiv:2310.06824; Haufe et al. 2014), while the step between the
classes is their difference of means. So a direction holds both: `vector` reads, `shift` writes (from the one class's
mean to the other's), and the removal is oblique: x - shift (vector . (x - mean)) / (vector . shift), which is the
orthogonal projection where the two are parallel.

How it can mislead: a direction is of one site, at the positions it was fitted on; on other data, after edits upstream
or in another model it may read something else; and a vector that reads a concept says nothing of whether the model
uses it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomoscope.errors import DataError, EditError
from tomoscope.model import Edit, add

FORMAT = "tomoscope direction 1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of one concept at one site.

    Attributes:
        concept: its name; the positive class where there are two.
        site: the site's name.
        vector: [width] reads: score = x . vector + bias on raw activations, whatever normalisation the fit used.
        bias: of the score.
        shift: [width] writes: one step from without to with.
        mean: [width] of the data it was fitted on; erasing leaves it where it is.
        at: positions that it was fitted at, as in `Subject.read` ("mean": the mean over tokens).
        method: how it was fitted.
        normalisation: what was done to activations before the fit ("none", "centre", "standard").
        fitted_on: which data, how many items.
        n: items it was fitted on.
        spread: standard deviation of the scores on those.
        seed: of the fit.
        null: the statistic under the null (for instance the best held-out accuracy over all layers with shuffled
            labels).
        notes: further facts, JSON only.
    """

    concept: str
    site: str
    vector: Float[Tensor, " width"]
    bias: float = 0.0
    shift: Float[Tensor, " width"] | None = None
    mean: Float[Tensor, " width"] | None = None
    at: Any = "last"
    method: str = ""
    normalisation: str = "none"
    fitted_on: str = ""
    n: int = 0
    spread: float = 1.0
    seed: int = 0
    null: tuple[float, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = len(self.vector)
        for name in ("shift", "mean"):
            given = getattr(self, name)
            if given is None:
                unit = self.vector / self.vector.norm().clamp(min=1e-30)
                object.__setattr__(self, name, unit if name == "shift" else torch.zeros_like(self.vector))
            elif len(given) != width:
                raise DataError(f"The {name} of {self.concept!r} is {len(given)} wide, its vector {width}.")
        if not all(torch.isfinite(part).all() for part in (self.vector, self.shift, self.mean) if part is not None):
            raise DataError(f"The direction of {self.concept!r} holds NaN or infinity.", remedy="See how it was made.")

    @property
    def width(self) -> int:
        """Width of the site."""
        return len(self.vector)

    @property
    def unit(self) -> Float[Tensor, " width"]:
        """The reading vector at length 1."""
        return self.vector / self.vector.norm().clamp(min=1e-30)

    def score(self, values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Above 0 where the concept is read; a logit where the method was logistic."""
        if values.shape[-1] != self.width:
            raise DataError(
                f"{self.concept!r} reads {self.width} numbers, not {values.shape[-1]}.", remedy="See .site."
            )
        return values.to(self.vector) @ self.vector + self.bias

    def flipped(self) -> Direction:
        """The same read the other way round."""
        assert self.shift is not None
        return dataclasses.replace(self, vector=-self.vector, bias=-self.bias, shift=-self.shift)

    def cosine(self, other: Direction | Tensor) -> float:
        """Between the reading vectors."""
        vector = other.vector if isinstance(other, Direction) else other
        return float(torch.nn.functional.cosine_similarity(self.vector.double(), vector.double(), dim=0))

    # ---- writing and removing

    def write(self, strength: float = 1.0, *, at: Any = None, rows: Any = None, during: str = "all") -> Edit:
        """Steer: add `strength` x `shift` at the site (1 = the whole way from the one class's mean to the other's)."""
        return add(self.site, self.shift, strength, at=at, rows=rows, during=during)

    def erase(self, *, at: Any = None, rows: Any = None, during: str = "all") -> Edit:
        """Remove: set what the vector reads to what it reads at the mean, by the shortest way along `shift`."""
        assert self.shift is not None
        assert self.mean is not None
        read = float(self.vector.double() @ self.shift.double())
        if abs(read) < 1e-12 * float(self.vector.double().norm() * self.shift.double().norm()):
            raise EditError(
                f"{self.concept!r} cannot be removed along its shift: the vector does not read it.",
                remedy="Remove along the vector itself: dataclasses.replace(direction, shift=direction.vector).",
            )
        return affine(self.site, self.vector[:, None] / read, self.shift[None], self.mean, at=at, rows=rows,
                      during=during)  # fmt: skip

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors with its provenance in the header; returns the path."""
        path = Path(path)
        skip = {"vector", "shift", "mean"}
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        tensors = {name: getattr(self, name).detach().float().contiguous().clone() for name in sorted(skip)}
        try:
            save_file(tensors, path, metadata={"format": FORMAT, "direction": json.dumps(facts, default=_plain)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} could not be written: {error}.", remedy="Give another path.") from error
        return path

    def __str__(self) -> str:
        return f"{self.concept} at {self.site} ({self.method}, n = {self.n})"


def load_direction(path: str | Path) -> Direction:
    """Read what `Direction.save` wrote. Raises DataError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("vector", "shift", "mean")}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        facts = json.loads(metadata["direction"])
        facts["null"] = tuple(facts["null"])
        return Direction(**facts, **tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no direction: {error}.", remedy="Give a file that `Direction.save` wrote."
        ) from error


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else str(value)


@dataclass(frozen=True, eq=False)
class Affine(Edit):
    """x - ((x - mean) reads) writes: a low-rank affine map of a site; make it with `affine`.

    Attributes:
        reads: [width, rank].
        writes: [rank, width].
        mean: [width].
    """

    reads: Tensor | None = None
    writes: Tensor | None = None
    mean: Tensor | None = None

    def apply(self, region: Tensor) -> Tensor:
        """The region with what `reads` finds of it taken away along `writes`."""
        assert self.reads is not None
        assert self.writes is not None
        assert self.mean is not None
        wide = region if region.dtype == torch.float64 else region.float()
        found = (wide - self.mean.to(wide)) @ self.reads.to(wide)
        return (wide - self.factor * found @ self.writes.to(wide)).to(region.dtype)


def affine(
    site: str,
    reads: Float[Tensor, "width rank"],
    writes: Float[Tensor, "rank width"],
    mean: Float[Tensor, " width"],
    scale: float = 1.0,
    *,
    at: Any = None,
    rows: Any = None,
    during: str = "all",
) -> Edit:
    """An edit x - scale x ((x - mean) reads) writes: the form of every linear erasure."""
    if reads.dim() != 2 or writes.shape != reads.T.shape or mean.shape != reads.shape[:1]:
        raise EditError(
            f"An affine edit at {site} reads {tuple(reads.shape)}, writes {tuple(writes.shape)}, mean "
            f"{tuple(mean.shape)}.", remedy="They are [width, rank], [rank, width] and [width].",
        )  # fmt: skip
    checked = add(site, mean, scale, at=at, rows=rows, during=during)  # the same checks as for every other edit
    return Affine(
        site, "affine", None, float(scale), at, checked.rows, during, reads=reads.detach(), writes=writes.detach(),
        mean=mean.detach(),
    )  # fmt: skip
