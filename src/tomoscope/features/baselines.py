"""What would a dictionary have to beat? Dumb dictionaries of the same sparsity, measured by the same function.

    random      directions of equal norms, uniform on the sphere, the same number active a token; one scale, fitted
    pca         the first k principal components (k the dictionary's own L0): a dense basis of the same count
    neurons     the basis of the activation itself: its k largest coordinates, either sign, about the mean
    untrained   the same dictionary trained on a model that learned nothing (given by the caller)

Each is a `SparseCoder` like any other. How they can mislead: PCA is optimal for a *fixed* set of k directions, so a
dictionary that does not beat it explains no more than the covariance; random directions are an easy control where k is
near the width. A dictionary on an untrained model may have labels that score as well (arXiv:2501.17727).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.activations import ReLU, TopK
from tomoscope.features.coder import SparseCoder
from tomoscope.features.quality import Quality, measure_coder
from tomoscope.features.samples import decoded, samples, sites_of
from tomoscope.model import Subject


def moments(pieces: Iterable[Float[Tensor, "sample width"]]) -> tuple[Tensor, Tensor]:
    """Mean [width] and covariance [width, width] of a stream of samples, in doubles.

    Raises:
        DataError: fewer than two samples.
    """
    n, total, products = 0, torch.zeros(0), torch.zeros(0)
    for piece in pieces:
        x = piece.double()
        if not n:
            total, products = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        n, total, products = n + len(x), total + x.sum(0), products + x.T @ x
    if n < 2:
        raise DataError("A baseline needs at least two samples.")
    mean = total / n
    return mean, products / n - torch.outer(mean, mean)


def pca_coder(mean: Tensor, covariance: Tensor, k: int, name: str = "PCA") -> SparseCoder:
    """The projection on the first k principal components as a dictionary of 2k features (each direction and its
    opposite, rectified).
    """
    basis = torch.linalg.eigh(covariance)[1].flip(1)[:, : max(1, min(k, len(mean)))].float()
    return _signed(basis, mean.float(), ReLU(), name)


def neuron_coder(mean: Tensor, k: int, name: str = "neuron basis") -> SparseCoder:
    """The k largest coordinates about the mean, as a dictionary of the coordinates and their opposites."""
    return _signed(torch.eye(len(mean)), mean.float(), TopK(max(1, k)), name)


def random_coder(
    coder: SparseCoder, mean: Tensor, k: int, *, seed: int, name: str = "random directions"
) -> SparseCoder:
    """Random directions with the norms of a dictionary's, k of them active; its scale is 1 until fitted."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(coder.W_dec.shape, generator=generator)
    unit = drawn / drawn.norm(dim=-1, keepdim=True)
    norms = coder.W_dec.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    # encoded by the direction over its norm, so that one direction alone would give its own projection back
    return SparseCoder(
        (unit / norms).T.contiguous(), unit * norms, torch.zeros(coder.n_features), mean.float(), TopK(max(1, k)),
        centred=True, name=name,
    )  # fmt: skip


def fitted_scale(coder: SparseCoder, pieces: Iterable[Float[Tensor, "sample width"]]) -> float:
    """The factor of all codes that makes the squared error smallest: sum (y - b) . (y' - b) / sum |y' - b|^2."""
    top = bottom = 0.0
    for x in pieces:
        made = (decoded(coder, coder.sparse(x), x) - coder.b_dec).double()
        top += float((made * (x - coder.b_dec)).sum())
        bottom += float(made.square().sum())
    return top / bottom if bottom else 1.0


def _signed(basis: Tensor, mean: Tensor, activation: Any, name: str) -> SparseCoder:
    both = torch.cat([basis, -basis], 1)
    return SparseCoder(
        both, both.T.contiguous(), torch.zeros(both.shape[1]), mean, activation, centred=True, name=name
    )  # fmt: skip


def measure_baselines(
    subject: Subject,
    coder: SparseCoder,
    chosen: Sequence[Any],
    measured: Sequence[Any],
    *,
    k: float,
    reads: str = "",
    skip_first: bool = False,
    downstream: bool = True,
    untrained: tuple[Subject, SparseCoder] | None = None,
    seed: int = 0,
) -> dict[str, Quality]:
    """Measure what the dictionary has to beat, by name; the baselines are fitted on `chosen`, measured on `measured`.

    Args:
        subject: the model.
        coder: the dictionary, an autoencoder.
        chosen: prompts on which means, components and the scale are found.
        measured: other prompts, those on which the dictionary itself was measured.
        k: active features a token (the dictionary's L0), rounded up.
        reads: the site.
        skip_first, downstream: as in `measure_coder`.
        untrained: a model that learned nothing, and the dictionary of the same shape that was trained on it.
        seed: of the random directions and the intervals.

    Raises:
        DataError: a dictionary that writes another site than it reads (its baselines would need a fit of their own).
    """
    site, writes = sites_of(coder, reads)
    if writes != site or coder.d_in != coder.W_dec.shape[1]:
        raise DataError("Baselines are of autoencoders; a transcoder's would be other transcoders.")
    if k <= 0:
        raise DataError("The dictionary has no active feature, so there is no sparsity to match.")
    active = max(1, round(k))

    def stream() -> Iterable[Tensor]:
        return (piece.values[site] for piece in samples(subject, chosen, site, skip_first=skip_first))

    mean, covariance = moments(stream())
    plain = random_coder(coder, mean, active, seed=seed)
    scale = fitted_scale(plain, stream())
    fitted = SparseCoder(
        plain.W_enc * scale, plain.W_dec, plain.b_enc, plain.b_dec, plain.activation, centred=True, name=plain.name
    )  # fmt: skip
    dumb = {"random": fitted, "pca": pca_coder(mean, covariance, active), "neurons": neuron_coder(mean, active)}
    options: dict[str, Any] = {"reads": site, "skip_first": skip_first, "downstream": downstream, "seed": seed}
    found = {name: measure_coder(subject, one, measured, **options) for name, one in dumb.items()}
    if untrained is not None:
        other, dictionary = untrained
        found["untrained"] = measure_coder(other, dictionary, measured, **options)
    return found
