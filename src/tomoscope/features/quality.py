"""How good is a dictionary? What it keeps of the activations, how sparsely, and what its features do.

    quality = measure_coder(subject, coder, texts, reads="layer.3.resid_post")
    print(quality["explained_variance"], quality["ce_recovered_zero"], quality.dead)

Measures of activations (one pass; sums a cluster of prompts, nothing else is kept):

    explained_variance         1 - sum |y - y'|^2 / sum |y - mean y|^2, the mean over all samples (the right one)
    explained_variance_legacy  mean over tokens of 1 - |y - y'|^2 / |y - mean of its batch|^2, as SAELens and SAEBench
                               long reported: it depends on the batch and weighs tokens of small norm most
    l0, l1, mse, cosine        a sample's active features and their sum, squared error a coordinate, cosine
    l2_ratio                   mean |y'| / |y|; under 1: shrinkage
    reconstruction_bias        E|y'|^2 / E[y . y'] (Rajamanoharan et al. 2024, arXiv:2404.16014); 1 is unbiased
    dead, dense                shares of features that never fire, and that fire on over a tenth of the tokens

and of the model with the reconstruction in place of the activation (`splicing`): cross-entropy, the share of it that is
recovered against zero and mean ablation, and KL divergence from the model's own predictions.

How it can mislead: a dictionary is dead or dense on *this* text; cross-entropy recovered against zero ablation is near
1 for almost anything, as a zeroed stream is a catastrophe (compare with the controls, `baselines`); none of these says
that a feature means anything. Sources: Gao et al. 2024 (arXiv:2406.04093), Karvonen et al. 2025 (SAEBench,
arXiv:2503.09532).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.samples import decoded, samples, sites_of
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import ratio_interval, wilson_interval
from tomoscope.model import Subject

CLUSTERS = 512
"""At most so many clusters of prompts are kept apart, so that memory stays bounded; beyond, prompts share one."""
DENSE = 0.1
_SUMS = ("n", "error", "square", "made", "product", "cosine", "ratio", "l0", "l1", "legacy")
Piece = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Quality:
    """What was measured of one dictionary.

    Attributes:
        name: the dictionary's.
        measures: name -> estimate.
        fires: [feature], tokens on which each fired.
        n_tokens: tokens read.
        n_prompts: prompts read.
        width: of what is reconstructed.
        mean: [d_out], the mean of what is reconstructed.
    """

    name: str
    measures: Mapping[str, Estimate]
    fires: Int[np.ndarray, " feature"]
    n_tokens: int
    n_prompts: int
    mean: Float[np.ndarray, " d_out"] = field(repr=False)

    def __getitem__(self, name: str) -> Estimate:
        return self.measures[name]

    @property
    def density(self) -> Float[np.ndarray, " feature"]:
        """The share of tokens on which each feature fires."""
        return self.fires / max(1, self.n_tokens)

    @property
    def dead(self) -> Int[np.ndarray, " dead"]:
        """Features that never fired here."""
        return np.flatnonzero(self.fires == 0)

    def density_histogram(self, bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges of log10 density over the features that fired."""
        alive = self.density[self.fires > 0]
        low = -np.log10(max(10, self.n_tokens))
        return np.histogram(np.log10(alive), bins=bins, range=(float(low), 0.0))

    def document(self) -> dict[str, Any]:
        """As plain values."""
        counts, edges = self.density_histogram()
        return {
            "name": self.name, "n_tokens": self.n_tokens, "n_prompts": self.n_prompts, "n_features": len(self.fires),
            "measures": {name: one.model_dump(mode="json") for name, one in self.measures.items()},
            "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()},
        }  # fmt: skip


class Sums:
    """Running sums over clusters of prompts: what the measures are made of."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder = coder
        self.table = torch.zeros(CLUSTERS, len(_SUMS), dtype=torch.float64)
        self.vectors = torch.zeros(CLUSTERS, coder.W_dec.shape[1], dtype=torch.float64)
        self.fires = torch.zeros(coder.n_features, dtype=torch.long)
        self.prompts = 0

    @torch.no_grad()
    def add(
        self, x: Float[Tensor, "sample d_in"], y: Float[Tensor, "sample d_out"], prompt: Int[Tensor, " sample"]
    ) -> None:
        """Take some samples in: what is read, what is to be reconstructed, and which prompt each is of."""
        if not len(x):
            return
        codes = self.coder.sparse(x)
        made, y = decoded(self.coder, codes, x).double(), y.double()
        error = (y - made).square().sum(-1)
        norm, back = y.norm(dim=-1), made.norm(dim=-1)
        product = (y * made).sum(-1)
        spread = (y - y.mean(0)).square().sum(-1)
        active = torch.bincount(codes.sample, minlength=len(x)).double()
        total = torch.zeros(len(x), dtype=torch.float64).index_add_(0, codes.sample, codes.value.double())
        columns = [
            torch.ones_like(error), error, norm**2, back**2, product, product / (norm * back).clamp(min=1e-30),
            back / norm.clamp(min=1e-30), active, total, 1 - error / spread.clamp(min=1e-30),
        ]  # fmt: skip
        cluster = prompt % CLUSTERS
        self.table.index_add_(0, cluster, torch.stack(columns, -1))
        self.vectors.index_add_(0, cluster, y)
        self.fires += torch.bincount(codes.feature, minlength=self.coder.n_features)
        self.prompts = max(self.prompts, int(prompt.max()) + 1)

    def quality(self, *, seed: int = 0, more: Mapping[str, Estimate] | None = None) -> Quality:
        """The measures with their intervals (bootstrap over prompts)."""
        used = self.table[:, 0] > 0
        if not bool(used.any()):
            raise DataError("There is no token to measure the dictionary on.", remedy="Give prompts with tokens.")
        table = {name: self.table[used, i].numpy() for i, name in enumerate(_SUMS)}
        n, vectors = table["n"], self.vectors[used].numpy()
        mean = vectors.sum(0) / n.sum()
        variance = table["square"] - 2 * vectors @ mean + n * float(mean @ mean)
        d_out = vectors.shape[1]

        def per(name: str, below: np.ndarray = n, unit: str = "") -> Estimate:
            return ratio_interval(table[name], below, seed=seed, unit=unit)

        still = Estimate.unknown("the activations do not vary", unit="share")
        alive = variance.sum() > 1e-12 * max(table["square"].sum(), 1e-300)
        measures = {
            "explained_variance": ratio_interval(variance - table["error"], variance, seed=seed, unit="share")
            if alive
            else still,
            "explained_variance_legacy": per("legacy", unit="share") if alive else still,
            "l0": per("l0", unit="features a token"),
            "l1": per("l1"),
            "mse": per("error", n * d_out),
            "cosine": per("cosine"),
            "l2_ratio": per("ratio"),
            "reconstruction_bias": per("made", table["product"]),
        }
        count, tokens = len(self.fires), int(n.sum())
        dense = int((self.fires.double() / tokens > DENSE).sum())
        measures["dead"] = wilson_interval(int((self.fires == 0).sum()), count, unit="share of features")
        measures["dense"] = wilson_interval(dense, count, unit="share of features")
        measures |= more or {}
        return Quality(
            self.coder.name or repr(self.coder), measures, self.fires.numpy().copy(), tokens, self.prompts, mean
        )


def measure_activations(coder: SparseCoder, pieces: Iterable[Piece], *, seed: int = 0) -> Quality:
    """Measure a dictionary on activations that were kept, without the model.

    Args:
        coder: the dictionary.
        pieces: (x [sample, d_in], y [sample, d_out], prompt [sample]) again and again; y is x for an autoencoder.
        seed: of the intervals.
    """
    sums = Sums(coder)
    for x, y, prompt in pieces:
        sums.add(x, y, prompt)
    return sums.quality(seed=seed)


def measure_coder(
    subject: Subject,
    coder: SparseCoder,
    prompts: Sequence[Any],
    *,
    reads: str = "",
    writes: str = "",
    skip_first: bool = False,
    downstream: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> Quality:
    """Measure a dictionary on a model: what it keeps, how sparsely, and what the model loses with it in place.

    Args:
        subject: the model.
        coder: the dictionary.
        prompts: texts or rows of token ids; read twice.
        reads, writes: the sites; as the dictionary says where not given.
        skip_first: leave each prompt's first token out (it is then not replaced downstream either).
        downstream: measure cross-entropy and KL too (five forwards a prompt).
        batch_size: prompts at once; by the memory where not given.
        seed: of the intervals.

    Returns:
        See `Quality`; estimates stand on clusters of prompts.

    Raises:
        DataError: no prompts, or the dictionary's width is not the site's.
    """
    from tomoscope.features.splicing import downstream_measures

    reads, writes = sites_of(coder, reads, writes)
    sums = Sums(coder)
    for piece in samples(subject, prompts, *dict.fromkeys((reads, writes)), skip_first=skip_first,
                         batch_size=batch_size):  # fmt: skip
        check_width(coder, piece.values[reads], piece.values[writes], reads, writes)
        sums.add(piece.values[reads], piece.values[writes], piece.prompt)
    quality = sums.quality(seed=seed)
    if not downstream:
        return quality
    mean = torch.from_numpy(quality.mean).float()
    more = downstream_measures(
        subject, coder, prompts, mean, reads=reads, writes=writes, skip_first=skip_first, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    return sums.quality(seed=seed, more=more)


def check_width(coder: SparseCoder, x: Tensor, y: Tensor, reads: str, writes: str) -> None:
    """Raises DataError where a dictionary does not fit what its sites hold."""
    for site, have, want in ((reads, x.shape[1], coder.d_in), (writes, y.shape[1], coder.W_dec.shape[1])):
        if have != want:
            raise DataError(
                f"{site} is {have} wide, and {coder!r} takes {want}.", remedy="Name the site it was trained on."
            )
