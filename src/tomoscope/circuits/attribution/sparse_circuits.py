"""Sparse feature circuits: which features feed which on the way to a behaviour, over many prompts.

    effects = feature_effects(subject, pairs, coders)
    circuit = sparse_circuit(subject, pairs, coders, effects)   nodes and edges above thresholds
    faithfulness(subject, held_out, coders, circuit)

Nodes are features and errors with large effects (`feature_effects`). An edge is the effect of a change of the earlier
node on the metric through the later feature alone, to first order: the gradient is stopped at all other sites that have
a dictionary, so with dictionaries at few sites an edge goes through all that lies between.

How it can mislead: what dictionaries miss is in the error nodes, which a circuit may need as a whole; an edge is first
order at the clean run. Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv:2403.19647).

Steps: for each site one batch of vector-Jacobian products for all its kept features, every earlier site held; then the
products with what the earlier features and errors would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.feature_effects import Coders, FeatureEffects, ordered, values_of
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs
from tomoscope.features import SparseCoder, only_features
from tomoscope.model import Batch, Subject, replace
from tomoscope.model.gradients import frozen
from tomoscope.model.taps import Session

NODES, EDGES = 0.1, 0.01


@dataclass(frozen=True, eq=False)
class SparseCircuit:
    """Features and errors that matter, and how they feed each other.

    Attributes:
        nodes: site -> [node] features.
        errors: sites whose error is a node.
        effects: site -> [node].
        sources: [edge, 2] site's place among `sites` and feature, -1 for the error.
        targets: [edge, 2] likewise.
        weights: [edge].
        sites: in the order of the model.
    """

    nodes: dict[str, Int[Tensor, " node"]]
    errors: tuple[str, ...]
    effects: dict[str, Float[Tensor, " node"]]
    sources: Int[Tensor, "edge 2"]
    targets: Int[Tensor, "edge 2"]
    weights: Float[Tensor, " edge"]
    sites: tuple[str, ...]

    @property
    def n_nodes(self) -> int:
        """Features and errors."""
        return sum(len(some) for some in self.nodes.values()) + len(self.errors)

    def edges(self, n: int = 20) -> list[tuple[str, str, float]]:
        """The n strongest edges, named."""

        def name(end: Tensor) -> str:
            site, feature = self.sites[int(end[0])], int(end[1])
            return f"{site} {'error' if feature < 0 else f'f{feature}'}"

        best = self.weights.abs().topk(min(n, len(self.weights))).indices
        return [(name(self.sources[i]), name(self.targets[i]), float(self.weights[i])) for i in best]


def sparse_circuit(
    subject: Subject,
    pairs: Pairs,
    coders: Coders,
    effects: FeatureEffects,
    *,
    nodes: float = NODES,
    edges: float = EDGES,
    most: int = 200,
) -> SparseCircuit:
    """The features, errors and edges whose effects exceed thresholds.

    Args:
        subject: the model.
        pairs: those of the effects.
        coders: site -> dictionary.
        effects: of `feature_effects`.
        nodes: smallest absolute effect of a node.
        edges: smallest absolute weight of an edge.
        most: features of a site at most, those with the largest effects.
    """
    sites = ordered(subject, coders)
    kept, values = {}, {}
    for site in sites:
        effect = effects.features[site]
        best = effect.abs().topk(min(most, len(effect))).indices
        kept[site] = best[effect[best].abs() > nodes].sort().values
        values[site] = effect[kept[site]]
    errors = tuple(site for site in sites if abs(effects.errors[site]) > nodes)
    clean, other = values_of(subject, pairs, coders, sites, effects.ablation)
    sources, targets, weights = [], [], []
    for place, site in enumerate(sites):
        if not place or not len(kept[site]):
            continue
        found = _edges_into(subject, pairs, coders, effects, sites[:place], site, kept, clean, other)
        for number, earlier in enumerate(sites[:place]):
            ends = torch.cat([kept[earlier], torch.tensor([-1] if earlier in errors else [], dtype=torch.long)])
            block = found[earlier][:, : len(ends)] if earlier in errors else found[earlier][:, :-1]
            target, source = torch.nonzero(block.abs() > edges, as_tuple=True)
            at = torch.full_like(source, number)
            sources.append(torch.stack([at, ends[source]], 1))
            targets.append(torch.stack([torch.full_like(target, place), kept[site][target]], 1))
            weights.append(block[target, source])
    none = torch.zeros(0, 2, dtype=torch.long)
    return SparseCircuit(
        kept, errors, values, torch.cat([none, *sources]), torch.cat([none, *targets]),
        torch.cat([torch.zeros(0, dtype=torch.float64), *(w.double() for w in weights)]), tuple(sites),
    )  # fmt: skip


def _edges_into(
    subject: Subject,
    pairs: Pairs,
    coders: Coders,
    effects: FeatureEffects,
    earlier: Sequence[str],
    site: str,
    kept: Mapping[str, Tensor],
    clean: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> dict[str, Float[Tensor, "target source"]]:
    """For every earlier site, the edges from its kept features (and last its error) into a site's kept features."""
    coder, features = coders[site], kept[site].to(subject.device)
    wide = torch.float64 if subject.dtype == torch.float64 else torch.float32
    active = coder.encode(clean[site].to(wide))[..., features] > 0  # [pair, position, target]
    matters = effects.gradients[site].to(subject.device, wide) @ coder.decoder_rows(features, clean[site].to(wide)).T
    pull = (matters * active).permute(2, 0, 1)  # [target, pair, position]: what a unit of the feature there is worth
    reads = coder.encoder_rows(features, clean[site].to(wide))
    n, count = len(pairs), len(features)
    there = pairs.clean.mask.to(subject.device)
    out = {name: torch.zeros(count, len(kept[name]) + 1, dtype=wide) for name in earlier}
    changes = {name: _changes(coders[name], clean[name].to(wide), other[name].to(wide), kept[name], effects.ablation)
               for name in earlier}  # fmt: skip
    step = max(1, subject.rows_per_call(pairs.clean.width, subject.resolve(earlier), gradients=True) // n)
    for some in torch.arange(count).split(step):
        given = pull[some][..., None] * reads[some][:, None, None]  # [some, pair, position, d_model]
        grads = _pulled(subject, pairs.clean, earlier, site, clean, given.flatten(0, 1))
        for name in earlier:
            g = grads[name].reshape(len(some), n, *there.shape[1:], -1).to(wide) * there[..., None]
            codes, error = changes[name]
            rows = coders[name].decoder_rows(kept[name], g)
            per_feature = torch.einsum("jbpd,sd,bps->js", g, rows, codes) / n
            per_error = torch.einsum("jbpd,bpd->j", g, error) / n
            out[name][some] = torch.cat([per_feature, per_error[:, None]], 1).cpu()
    return out


def _changes(
    coder: SparseCoder, clean: Tensor, other: Tensor, features: Tensor, ablation: str
) -> tuple[Float[Tensor, "pair position some"], Float[Tensor, "pair position d_model"]]:
    """By how much some features' codes and the error change."""
    before = coder.encode(clean)
    after = torch.zeros_like(before) if ablation == "zero" else coder.encode(other)
    error = other - clean - (after - before) @ coder.W_dec.to(clean)
    chosen = features.to(clean.device)
    return (after - before)[..., chosen], error


def _pulled(
    subject: Subject,
    batch: Batch,
    earlier: Sequence[str],
    site: str,
    clean: Mapping[str, Tensor],
    given: Float[Tensor, "row position d_model"],
) -> dict[str, Tensor]:
    """What a site's cotangents give at every earlier site, each of them held, so that only direct paths count."""
    times = len(given) // len(batch)
    tiled = batch.take(torch.arange(len(batch)).repeat(times))
    sites = subject.resolve([*earlier, site])
    edits = [replace(name, clean[name].repeat(times, 1, 1)) for name in earlier]
    session = Session(
        subject.model, subject.structure, reads=sites, edits=subject.bind(edits, tiled), batch_size=len(tiled),
        graph=True, stop=True,
    )  # fmt: skip
    with torch.enable_grad(), frozen(subject.model), session:
        subject.model(**subject.forward_arguments(tiled))
    values = [session.values[one] for one in sites]
    target = session._shaped(sites[-1], values[-1]) * session.tap(sites[-1]).factor
    found = torch.autograd.grad(target, values[:-1], given.to(target), allow_unused=True)
    out = {}
    for one, value, grad in zip(sites[:-1], values[:-1], found, strict=True):
        grad = torch.zeros_like(value) if grad is None else grad
        out[one.name] = session._shaped(one, grad) / session.tap(one).factor
    return out


@torch.no_grad()
def faithfulness(
    subject: Subject,
    pairs: Pairs,
    coders: Coders,
    circuit: SparseCircuit,
    *,
    metric: Metric | None = None,
    ablation: str = "paired",
    keep_errors: bool = False,
) -> float:
    """How much of the clean metric is left when all features but the circuit's are ablated at every site.

    (m(circuit) - m(nothing)) / (m(model) - m(nothing)), means over pairs first; nothing is every feature ablated.

    Args:
        subject: the model.
        pairs: preferably others than the circuit was found on.
        coders: site -> dictionary.
        circuit: the circuit.
        metric: of pairs; the logit difference by default.
        ablation: as in `feature_effects`.
        keep_errors: leave all errors as they are; else only those that are nodes.
    """
    judge, rows = metric or pairs.metric(), torch.arange(len(pairs))
    sites = ordered(subject, coders)
    _, other = values_of(subject, pairs, coders, sites, ablation)
    wide = torch.float64 if subject.dtype == torch.float64 else torch.float32

    def run(nodes: Mapping[str, Tensor], errors: Sequence[str]) -> float:
        edits = []
        for site in sites:
            value = other[site].to(wide)
            codes = coders[site].encode(value)
            codes = torch.zeros_like(codes) if ablation == "zero" else codes
            missed = value - coders[site].decode(codes, value)
            edits.append(
                only_features(site, coders[site], nodes[site], codes, missed, keep_errors=keep_errors or site in errors)
            )
        return float(judge(subject.last_logits(pairs.clean, edits=edits), rows).mean())

    none = {site: torch.zeros(0, dtype=torch.long) for site in sites}
    nothing, found = run(none, ()), run(circuit.nodes, circuit.errors)
    whole = float(judge(subject.last_logits(pairs.clean), rows).mean())
    return (found - nothing) / (whole - nothing) if whole != nothing else float("nan")
