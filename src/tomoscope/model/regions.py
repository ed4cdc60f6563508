"""Which region of a site's value an edit or a read selects, and writing into it.

A region is given by rows of the batch, columns of the padded batch and heads; its axes keep the site's order, and a
single position or head drops its axis. The same rule serves `read`, `at=` and every edit, so a value that was read
fits back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tomoscope.errors import EditError, UnavailableSiteError
from tomoscope.model.edits import Edit
from tomoscope.model.sites import Site


@dataclass(frozen=True)
class Bound:
    """An edit resolved for one batch: its site, the rows, and the columns of the padded batch."""

    edit: Edit
    site: Site
    rows: Int[Tensor, " row"] | None
    columns: Int[Tensor, "batch position"] | None
    single: bool


def select(
    value: Tensor, site: Site, rows: Tensor | None, columns: Tensor | None, *, past: int = 0, single: bool = False
) -> Tensor:
    """The region of a site's value that rows, columns and the site's heads select, in the site's order of axes."""
    place, heads = site.position_axis, site.head_axis
    moved = _position_first(value, place)
    if columns is None:
        region = moved if rows is None else moved[rows.to(value.device)]
    else:
        if bool((columns - past >= moved.shape[1]).any()):
            raise UnavailableSiteError(
                f"{site.name} has {moved.shape[1]} positions, fewer than the prompt's tokens, so they are not those.",
                remedy="Read all its positions, without `at`.",
            )
        which = torch.arange(len(columns)) if rows is None else rows
        region = moved[which[:, None].to(value.device), (columns[which] - past).to(value.device)]
    region = _position_back(region, place)
    if site.heads and heads is not None:
        picked = torch.tensor(site.heads, device=value.device)
        region = region.index_select(heads, picked)
        region = region.squeeze(heads) if len(site.heads) == 1 else region
    if single and place is not None and columns is not None:
        dropped = len(site.heads) == 1 and heads is not None and heads < place
        region = region.squeeze(place - 1 if dropped else place)
    return region


def write_all(value: Tensor, edits: Sequence[Bound], site: Site, *, past: int = 0) -> Tensor:
    """The value after edits in their order: the same object where none reaches it, else a new tensor.

    The first partial write copies the value and later ones write into that copy, so a stack of thousands of edits on
    different rows costs one copy.
    """
    owned = False
    for bound in edits:
        if in_reach(bound, site, value, past):
            value = _write(value, bound, past=past, owned=owned)
            owned = bound.edit.op == "scatter" or bound.rows is not None or bound.columns is not None
    return value


def _write(value: Tensor, bound: Bound, *, past: int, owned: bool) -> Tensor:
    site, edit, place = bound.site, bound.edit, bound.site.position_axis
    if edit.op == "scatter":
        return _scatter(value, bound, past, owned)
    rows, columns = bound.rows, bound.columns
    old = select(value, site, rows, columns, past=past, single=bound.single)
    new = edit.apply(old).to(value.dtype)
    if rows is None and columns is None and not site.heads:
        return new
    whole = Site(site.part, site.layer, (), site.path)
    full = select(value, whole, rows, columns, past=past)
    if site.heads and site.head_axis is not None:
        new = new.reshape(*full.shape[: site.head_axis], len(site.heads), *full.shape[site.head_axis + 1 :])
        full = full.index_copy(site.head_axis, torch.tensor(site.heads, device=value.device), new)
    else:
        full = new.reshape(full.shape)
    if rows is None and columns is None:
        return full
    moved = _position_first(value if owned else value.clone(), place)
    region = _position_first(full, place)
    which = (torch.arange(len(moved)) if rows is None else rows).to(value.device)
    if columns is None:
        moved[which] = region
    else:
        moved[which[:, None], (columns.to(value.device)[which] - past)] = region
    return _position_back(moved, place)


def _scatter(value: Tensor, bound: Bound, past: int, owned: bool) -> Tensor:
    assert bound.edit.index is not None
    assert bound.edit.value is not None
    rows, columns, heads = bound.edit.index.to(value.device).unbind(1)
    moved = _position_first(value if owned else value.clone(), bound.site.position_axis)
    new = bound.edit.value.to(device=value.device, dtype=value.dtype)
    if bound.site.head_axis is None:
        moved[rows, columns - past] = new
    else:
        moved[rows, columns - past, heads] = new
    return _position_back(moved, bound.site.position_axis)


def _position_first(value: Tensor, place: int | None) -> Tensor:
    return value if place in (None, 1) else value.movedim(place, 1)  # type: ignore[arg-type]


def _position_back(value: Tensor, place: int | None) -> Tensor:
    return value if place in (None, 1) else value.movedim(1, place)  # type: ignore[arg-type]


def in_reach(bound: Bound, site: Site, value: Tensor, past: int) -> bool:
    """Whether an edit's columns are among those of this call (in cached decoding most are not)."""
    if bound.edit.op == "scatter":
        columns = bound.edit.index[:, 1] if bound.edit.index is not None else None
    else:
        columns = bound.columns
    if columns is None:
        return True
    place = site.position_axis
    if place is None:
        raise EditError(f"{site.name} has no positions, so `at` can't select any.")
    inside = (columns >= past) & (columns < past + value.shape[place])
    if bool(inside.all()):
        return True
    if bool(inside.any()):
        raise EditError(f"The edit at {site.name} spans cached and new tokens.", remedy="Split it by position.")
    return False
