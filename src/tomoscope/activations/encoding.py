"""How activations lie on disk: bfloat16, float16, float32, or int8 with a scale a row.

Int8 takes a row's largest value as 127; half a step of it is the error of each number, so a row with one very large
coordinate (a massive activation) loses its small ones. Float16 overflows above 65,504 and says so.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError, nearest

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
SCALE = ":scale"
"""What follows a site's name in the name of its rows' scales."""


def check_type(name: str) -> torch.dtype:
    """The torch type of a name. Raises DataError for an unknown one."""
    if name not in TYPES:
        raise DataError(
            f"Activations can't be stored as {name!r}.", remedy=nearest(name, TYPES) or f"Known: {', '.join(TYPES)}."
        )
    return TYPES[name]


def stored(site: str, value: Float[Tensor, "row width"], kind: str) -> dict[str, Tensor]:
    """A site's rows as the tensors of a file."""
    if kind != "int8":
        out = value.to(TYPES[kind])
        if kind == "float16" and not bool(torch.isfinite(out).all()):
            raise DataError(
                f"{site} holds {float(value.abs().max()):.3g}, more than float16 can.", remedy="Store it as bfloat16."
            )
        return {site: out.contiguous()}
    wide = value.float()
    scale = wide.abs().amax(1) / 127
    steps = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return {site: steps.to(torch.int8), site + SCALE: scale}


def restored(value: Tensor, scale: Tensor | None, dtype: torch.dtype | None, out: Tensor | None = None) -> Tensor:
    """Rows as numbers again, in `dtype` (that of the file by default, float32 where it is int8), perhaps in `out`."""
    if scale is None:
        if out is not None:
            return out.copy_(value)
        return value if dtype is None else value.to(dtype)
    # numbers are made wide first, in place where they can be: a product of mixed types is eight times as slow
    wide = out if out is not None and out.dtype == torch.float32 else torch.empty(value.shape, dtype=torch.float32)
    wide.copy_(value).mul_(scale[:, None])
    if out is not None:
        return wide if wide is out else out.copy_(wide)
    return wide if dtype is None else wide.to(dtype)
