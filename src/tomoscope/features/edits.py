"""Edits of features: the activation without some features of a dictionary, or with nothing but some.

    subject.run(prompts, edits=[without_features("layer.3.resid_post", coder, [17, 290])])
    subject.run(prompts, edits=[only_features("layer.3.resid_post", coder, circuit, codes, errors)])

They are edits like any other (they compose, and work while generating), whose value is computed from the activation
that the run itself has: a feature is encoded there, and its part is taken away or replaced; all that is not named stays
to the bit, the error too unless it is to be replaced. How it can mislead: a feature that is taken away may be told by
others that are left, and an activation without it was never seen in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import EditError
from tomoscope.features.coder import SparseCoder
from tomoscope.model.edits import At, Edit


@dataclass(frozen=True, eq=False)
class FeatureEdit(Edit):
    """Replace features of a dictionary; make it with `without_features` or `only_features`.

    Attributes:
        coder: the dictionary, which reads and writes this site.
        features: [some], which features are replaced (or, with `keep`, all but these).
        keep: `features` are those that stay.
        errors: whether what the dictionary misses is replaced too.
    """

    coder: SparseCoder | None = None
    features: Int[Tensor, " some"] | None = None
    keep: bool = False
    errors: bool = False

    def apply(self, region: Tensor) -> Tensor:
        """The region with the features replaced by `value`'s codes (0 by default)."""
        assert self.coder is not None  # the constructors below see to it
        assert self.features is not None
        wide = region if region.dtype == torch.float64 else region.float()
        codes = self.coder.encode(wide)
        n, chosen = self.coder.n_features, self.features.to(region.device)
        given = None if self.value is None else self.value.to(wide)
        if self.keep:
            change = (codes.new_zeros(()) if given is None else given[..., :n]) - codes
            change[..., chosen] = 0
            moved = change @ self.coder.W_dec.to(wide)
        else:
            change = (0.0 if given is None else given[..., :n][..., chosen]) - codes[..., chosen]
            moved = change @ self.coder.decoder_rows(chosen, wide)
        if self.errors:
            error = wide - self.coder.decode(codes, wide)
            moved = moved - error if given is None else moved + given[..., n:] - error
        return (wide + moved).to(region.dtype)

    def describe(self) -> dict[str, Any]:
        """As plain values for a record."""
        out = super().describe()
        out["coder"] = repr(self.coder)
        return out


def without_features(
    site: str,
    coder: SparseCoder,
    features: Sequence[int] | Tensor,
    codes: Float[Tensor, ...] | None = None,
    *,
    at: At = None,
    rows: Sequence[int] | None = None,
) -> Edit:
    """Take features away, or set them to other values.

    Args:
        site: what the dictionary reads and writes.
        coder: the dictionary.
        features: which.
        codes: [.., feature] what all features would be instead, of which those named are used; 0 by default.
        at, rows: where, as for any edit.

    Raises:
        EditError: the dictionary reads another width than it writes, or has no such feature.
    """
    return _made(site, coder, features, codes, at, rows, keep=False, errors=False)


def only_features(
    site: str,
    coder: SparseCoder,
    features: Sequence[int] | Tensor,
    codes: Float[Tensor, "... feature"] | None = None,
    errors: Float[Tensor, "... d_model"] | None = None,
    *,
    keep_errors: bool = False,
    at: At = None,
    rows: Sequence[int] | None = None,
) -> Edit:
    """Keep some features and replace all others, and the error unless it is to stay.

    Args:
        site: what the dictionary reads and writes.
        coder: the dictionary.
        features: those that stay as they are.
        codes: [.., feature] what the others become; 0 by default.
        errors: [.., d_model] what the error becomes; 0 by default. Given with `codes`, of the same axes.
        keep_errors: leave the error as it is.
        at, rows: where.
    """
    if codes is not None:
        if errors is None:
            errors = codes.new_zeros(*codes.shape[:-1], coder.d_in)
        codes = torch.cat([codes, errors.to(codes)], dim=-1)
    elif errors is not None:
        raise EditError("An error to be put in needs the codes to be put in beside it.")
    return _made(site, coder, features, codes, at, rows, keep=True, errors=not keep_errors)


def _made(
    site: str,
    coder: SparseCoder,
    features: Sequence[int] | Tensor,
    value: Tensor | None,
    at: At,
    rows: Sequence[int] | None,
    *,
    keep: bool,
    errors: bool,
) -> Edit:
    if coder.d_in != coder.W_dec.shape[1]:
        raise EditError(f"The dictionary of the edit at {site} does not write what it reads.")
    chosen = torch.as_tensor(features, dtype=torch.long).flatten()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < coder.n_features:
        raise EditError(f"The edit at {site} names feature {int(chosen.max())}; there are {coder.n_features}.")
    return FeatureEdit(
        site, "features", value, 1.0, at, None if rows is None else tuple(rows), coder=coder, features=chosen,
        keep=keep, errors=errors,
    )  # fmt: skip
