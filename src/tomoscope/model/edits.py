"""Edits: what to write at a site, as values that compose, print, compare and go into the record.

    add("layer.6.resid_post", direction, 4.0, at="last")      add 4 x direction at the last token
    replace("layer.3.attn.z[head=2]", other["layer.3.attn.z[head=2]"], at="subject")
    zero("layer.0.mlp.out")     scale(site, 0.5)     project_out(site, directions)     noise(site, 3.0, seed=0)

An edit is applied to the tensor that the model itself computed, in the order of the list, before anything reads the
site. `at` says where, as in `Subject.read`; `rows` which items of the batch; a head selection in the site's name which
heads. The value must broadcast against the region that the edit selects, whose shape is exactly what `read` with the
same site and `at` returns (restricted to `rows`).

How it can mislead: a *scale*, *zero* or *mean* edit takes the model off its distribution; a replacement from another
prompt (a patch) stays closer to it. Adding the same vector at every position also moves attention's keys and values.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import EditError

At = int | str | Sequence[int | str] | None


@dataclass(frozen=True, eq=False)
class Edit:
    """One write at one site. Make it with `add`, `replace`, `scale`, `zero`, `project_out`, `noise` or `scatter`.

    Attributes:
        site: the site's name, with an optional head selection.
        op: "add", "replace", "scale", "project_out", "noise" or "scatter".
        value: the operand; None for an operation without one.
        factor: the scalar of "add" (strength), "scale" and "noise" (standard deviation).
        at: positions as in `Subject.read`; None for all.
        rows: items of the batch; None for all.
        during: "all", or only the "prefill" (the prompt) or the "decode" steps (generated tokens) of a generation.
        seed: the noise's seed.
        draws: for "noise" in a piece of a batch, which rows of the whole region these are; None for all.
        index: for "scatter", [entry, 3] = row, position column of the padded batch, head (-1: the site has none).
    """

    site: str
    op: str
    value: Tensor | None = None
    factor: float = 1.0
    at: At = None
    rows: tuple[int, ...] | None = None
    during: str = "all"
    seed: int = 0
    index: Tensor | None = None
    draws: tuple[int, ...] | None = None

    def apply(self, region: Tensor) -> Tensor:
        """The edited region (same shape, dtype and device as the region given)."""
        if self.op == "scale":
            return region * self.factor
        if self.op == "noise":
            # drawn on the CPU and row by row, so that neither the device nor how a batch is cut changes the noise
            places = range(len(region)) if self.draws is None else self.draws
            draws = [
                torch.randn(region.shape[1:], generator=torch.Generator().manual_seed((self.seed << 20) + place))
                for place in places
            ]
            return region + self.factor * torch.stack(draws).to(region)
        assert self.value is not None  # the constructors below see to it
        value = self.value.to(device=region.device, dtype=region.dtype)
        if self.op == "project_out":
            basis = orthonormal(value)
            return region - (region @ basis) @ basis.T
        try:
            torch.broadcast_shapes(value.shape, region.shape)
            fits = torch.broadcast_shapes(value.shape, region.shape) == region.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise EditError(
                f"The value of the edit at {self.site} has shape {tuple(value.shape)}, but the region it is to be "
                f"written "
                f"to has shape {tuple(region.shape)}.",
                remedy="Read the site with the same `at` to see the shape; a vector of the last axis always fits.",
            )
        return region + self.factor * value if self.op == "add" else value.expand_as(region)

    def describe(self) -> dict[str, Any]:
        """The edit as plain values for a record; a tensor is given by its shape, norm and hash."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                exact = value.detach().cpu().contiguous()
                raw = exact.view(torch.uint8).numpy().tobytes() if exact.dim() else exact.reshape(1).numpy().tobytes()
                digest = hashlib.sha256(raw).hexdigest()[:16]
                value = {"shape": list(value.shape), "norm": float(exact.float().norm()), "sha256": digest}
            out[field.name] = value
        return out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash((self.site, self.op, self.factor, self.rows, self.seed))

    def __str__(self) -> str:
        where = "" if self.at is None else f" at {self.at}"
        strength = "" if self.op in ("replace", "project_out", "scatter") else f" {self.factor:g}"
        return f"{self.op}{strength} {self.site}{where}"


def orthonormal(directions: Float[Tensor, "count width"] | Float[Tensor, " width"]) -> Float[Tensor, "width rank"]:
    """An orthonormal basis of the span of some directions, in their dtype; dependent directions are dropped."""
    matrix = directions.reshape(-1, directions.shape[-1]).double()
    left, values, _ = torch.linalg.svd(matrix.T, full_matrices=False)
    keep = values > values.max() * 1e-10
    return left[:, keep].to(directions.dtype)


def _tensor(value: Any, site: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EditError(
            f"The value of the edit at {site} is no array: {error}.", remedy="Give a tensor or list."
        ) from error
    if not torch.isfinite(tensor).all():
        raise EditError(
            f"The value of the edit at {site} holds NaN or infinity.", remedy="Check where it was computed."
        )
    return tensor.detach()


def add(site: str, vector: Any, scale: float = 1.0, *, at: At = None, rows: Any = None, during: str = "all") -> Edit:
    """Add `scale` x vector: steering, or a difference of activations. The vector broadcasts against the region."""
    return Edit(site, "add", _tensor(vector, site), float(scale), at, _rows(rows), _during(during))


def replace(site: str, value: Any, *, at: At = None, rows: Any = None, during: str = "all") -> Edit:
    """Write a value: an activation of another prompt or position, a mean, a resample."""
    return Edit(site, "replace", _tensor(value, site), 1.0, at, _rows(rows), _during(during))


def scale(site: str, factor: float, *, at: At = None, rows: Any = None, during: str = "all") -> Edit:
    """Multiply by a factor."""
    return Edit(site, "scale", None, float(factor), at, _rows(rows), _during(during))


def zero(site: str, *, at: At = None, rows: Any = None, during: str = "all") -> Edit:
    """Set to zero (zero ablation)."""
    return scale(site, 0.0, at=at, rows=rows, during=during)


def project_out(site: str, directions: Any, *, at: At = None, rows: Any = None, during: str = "all") -> Edit:
    """Remove the component in the span of one or more directions [direction, width], which need not be orthogonal."""
    return Edit(site, "project_out", _tensor(directions, site).float(), 1.0, at, _rows(rows), _during(during))


def noise(site: str, deviation: float, *, at: At = None, rows: Any = None, seed: int = 0, during: str = "all") -> Edit:
    """Add Gaussian noise of a standard deviation; each row's draw depends on the seed and its place alone."""
    return Edit(site, "noise", None, float(deviation), at, _rows(rows), _during(during), seed)


def scatter(site: str, index: Int[Tensor, "entry 3"], values: Float[Tensor, "entry width"]) -> Edit:
    """Write many vectors at once, each at its own row, padded column and head (-1 for none): the batched patch.

    All entries are written by one indexed assignment, so a grid of thousands of patches costs no loop.
    """
    if index.dim() != 2 or index.shape[1] != 3 or len(index) != len(values):
        raise EditError(f"A scatter at {site} needs an index [entry, 3] and as many values, not {tuple(index.shape)}.")
    return Edit(site, "scatter", values.detach(), index=index)


def _rows(rows: Any) -> tuple[int, ...] | None:
    if rows is None:
        return None
    return (int(rows),) if isinstance(rows, int) else tuple(int(row) for row in rows)


def _during(during: str) -> str:
    if during not in ("all", "prefill", "decode"):
        raise EditError(f"during={during!r} is unknown.", remedy="It is 'all', 'prefill' or 'decode'.")
    return during


def rows_of(edit: Edit, start: int, count: int, total: int, dims: int) -> Edit | None:
    """An edit for some consecutive rows of a batch that is run in pieces; None where it names none of them.

    Args:
        edit: for the whole batch.
        start: first row of the piece.
        count: rows of the piece.
        total: rows of the batch.
        dims: axes of the region that the edit selects; a value with as many and a row each is cut with the batch.
    """
    if edit.op == "scatter" and edit.index is not None and edit.value is not None:
        inside = (edit.index[:, 0] >= start) & (edit.index[:, 0] < start + count)
        index = edit.index[inside].clone()
        index[:, 0] -= start
        return dataclasses.replace(edit, index=index, value=edit.value[inside])
    rows = range(total) if edit.rows is None else edit.rows
    mine = [place for place, row in enumerate(rows) if start <= row < start + count]
    if not mine:
        return None
    value = edit.value
    if value is not None and edit.op != "project_out" and value.dim() == dims and len(value) == len(rows):
        value = value[mine]
    kept = None if edit.rows is None else tuple(rows[place] - start for place in mine)
    return dataclasses.replace(edit, value=value, rows=kept, draws=tuple(mine))
