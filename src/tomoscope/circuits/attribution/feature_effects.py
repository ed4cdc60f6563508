"""How much each feature of sparse autoencoders matters for a behaviour, over many prompts.

    effects = feature_effects(subject, pairs, coders)           coders: site -> dictionary
    effects.top(10)

At each site the activation is features + error. A feature's effect is how much the metric would move if it went from
its clean to its corrupted value (or to 0), by integrated gradients along the straight line between the two at that
site; features and error of a site sum to the effect of the whole site, up to the integral (`whole` is that effect as it
is when run). Effects are summed over positions and averaged over pairs.

How it can mislead: two features that stand in for each other both get small effects; along the line other features of
the site move too. Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv:2403.19647).

Steps: values at every site in both runs; gradients along the line, all steps as rows of one batch; features' and the
errors' shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs
from tomoscope.errors import DataError, SiteError
from tomoscope.features import SparseCoder
from tomoscope.model import Batch, Subject, replace

STEPS = 10
PARTS = ("resid_pre", "attn.out", "resid_mid", "mlp.out", "resid_post")
Coders = Mapping[str, SparseCoder]


@dataclass(frozen=True, eq=False)
class FeatureEffects:
    """Effects of features and errors on a metric.

    Attributes:
        features: site -> [feature].
        errors: site -> the error's.
        gradients: site -> [pair, position, d_model], averaged along the line.
        whole: site -> metric with the whole site corrupted less metric of the clean run, as it is when run.
        clean: [pair] metric.
        corrupted: [pair] metric; of a run with every site at its ablated value where there is no corrupted prompt.
        ablation: "paired" or "zero".
        metric: its name.
    """

    features: dict[str, Float[Tensor, " feature"]]
    errors: dict[str, float]
    gradients: dict[str, Float[Tensor, "pair position d_model"]]
    whole: dict[str, float]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    ablation: str
    metric: str

    def top(self, n: int = 10) -> list[tuple[str, int, float]]:
        """The n features (site, number, effect) with the largest effects, whatever the sign."""
        found = []
        for site, values in self.features.items():
            best = values.abs().topk(min(n, len(values))).indices.tolist()
            found += [(site, feature, float(values[feature])) for feature in best]
        return sorted(found, key=lambda one: -abs(one[2]))[:n]


def feature_effects(
    subject: Subject,
    pairs: Pairs,
    coders: Coders,
    *,
    metric: Metric | None = None,
    steps: int = STEPS,
    ablation: str = "paired",
) -> FeatureEffects:
    """Effects of all features of all dictionaries, and of their errors.

    Args:
        subject: the model.
        pairs: clean and corrupted prompts.
        coders: site -> the dictionary that reads and writes it.
        metric: of pairs; the logit difference of their answers by default.
        steps: of the integral (midpoints of as many pieces).
        ablation: what a feature would become: "paired", as in the corrupted prompt, or "zero".

    Raises:
        DataError: an unknown ablation, or a dictionary that is none of its site.
    """
    if ablation not in ("paired", "zero"):
        raise DataError(f"ablation={ablation!r} is unknown.", remedy="It is 'paired' or 'zero'.")
    judge = metric or pairs.metric()
    sites = ordered(subject, coders)
    clean, other = values_of(subject, pairs, coders, sites, ablation)
    features, errors, gradients, whole = {}, {}, {}, {}
    base = judge(subject.last_logits(pairs.clean), torch.arange(len(pairs))).cpu()
    for site in sites:
        gradients[site] = _along(subject, pairs.clean, site, clean[site], other[site], judge, steps)
        features[site], errors[site] = _shared(coders[site], clean[site], other[site], gradients[site], pairs, ablation)
        patched = subject.last_logits(pairs.clean, edits=[replace(site, other[site])])
        whole[site] = float((judge(patched, torch.arange(len(pairs))).cpu() - base).mean())
    if ablation == "paired":
        corrupted = subject.last_logits(pairs.corrupted)
    else:
        corrupted = subject.last_logits(pairs.clean, edits=[replace(site, other[site]) for site in sites])
    after = judge(corrupted, torch.arange(len(pairs))).cpu()
    return FeatureEffects(features, errors, gradients, whole, base, after, ablation, judge.name)


def ordered(subject: Subject, coders: Coders) -> list[str]:
    """Names of the sites in the order in which the model computes them, each checked to fit its dictionary."""
    places = []
    for name, coder in coders.items():
        site = subject.resolve([name])[0]
        if site.part not in PARTS or site.layer is None or site.name != name:
            raise SiteError(
                f"{name} can't have a dictionary here.", remedy=f"Sites: layer.N and one of {', '.join(PARTS)}."
            )
        if coder.d_in != subject.facts.d_model or coder.W_dec.shape[1] != coder.d_in:
            raise DataError(f"The dictionary at {name} does not read and write the stream's width.")
        places.append((site.layer, PARTS.index(site.part), name))
    return [name for *_, name in sorted(places)]


def values_of(
    subject: Subject, pairs: Pairs, coders: Coders, sites: Sequence[str], ablation: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of each site in the clean run, and what they would become; 0 at padding, where some families give nan."""
    acts = subject.read(pairs.clean, *sites, keep_device=True)
    there = pairs.clean.mask.to(subject.device)[..., None]
    clean = {site: torch.where(there, acts[site], 0.0) for site in sites}
    if ablation == "paired":
        acts = subject.read(pairs.corrupted, *sites, keep_device=True)
        other = {site: acts[site] for site in sites}
    else:
        other = {site: coders[site].b_dec.to(clean[site]).expand_as(clean[site]) for site in sites}
    return clean, {site: torch.where(there, other[site], 0.0) for site in sites}


def _along(
    subject: Subject, batch: Batch, site: str, clean: Tensor, other: Tensor, metric: Metric, steps: int
) -> Float[Tensor, "pair position d_model"]:
    """The metric's gradient at a site, averaged along the line between two values; steps are rows of the batch."""
    n = len(batch)
    alphas = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    step = max(1, subject.rows_per_call(batch.width, subject.resolve([site]), gradients=True) // n)
    total = torch.zeros_like(clean)
    for some in alphas.split(step):
        tiled = batch.take(torch.arange(n).repeat(len(some)))
        shape = (-1, *[1] * clean.dim())
        value = clean + some.to(clean).reshape(shape) * (other - clean)
        grads = subject.gradients(tiled, _judged(metric), [site], edits=[replace(site, value.flatten(0, 1))])
        total += grads.gradients[site].reshape(len(some), n, *clean.shape[1:]).sum(0).to(total)
    return total / steps


def _judged(metric: Metric) -> Any:
    """A metric of last logits as one of a batch's logits; rows know which pair they are."""

    def judge(logits: Tensor, batch: Batch) -> Tensor:
        rows = torch.arange(len(batch), device=logits.device)
        return metric(logits[rows, batch.last.to(logits.device)], batch.indices.cpu())

    return judge


def _shared(
    coder: SparseCoder, clean: Tensor, other: Tensor, gradient: Tensor, pairs: Pairs, ablation: str
) -> tuple[Float[Tensor, " feature"], float]:
    """What of a site's effect is each feature's and the error's."""
    n, there = len(pairs), pairs.clean.mask.to(clean.device).flatten()
    wide = clean.dtype if clean.dtype == torch.float64 else torch.float32
    x, y, g = (value.flatten(0, 1)[there].to(wide) for value in (clean, other, gradient))
    out = torch.zeros(coder.n_features, dtype=wide, device=x.device)
    made = torch.zeros_like(x)
    for value, sign in ((x, -1.0), (y, 1.0)):
        if sign > 0 and ablation == "zero":
            continue  # b_dec alone: no feature is there
        codes = coder.sparse(value)
        rows = coder.decoder_rows(codes.feature, x) * (sign * codes.value)[:, None]
        out.index_add_(0, codes.feature, (rows * g[codes.sample]).sum(1))
        made.index_add_(0, codes.sample, rows)
    error = ((y - x - made) * g).sum()
    return (out / n).cpu(), float(error / n)
