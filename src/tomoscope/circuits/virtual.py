"""What the weights alone say: which feature feeds which, what heads do to features, and which heads make a circuit.

    virtual = VirtualWeights(subject, transcoders)
    virtual.features(2, 5)                 [target, source], what a unit of each feature of layer 2 adds to layer 5's
    virtual.ov(4, 1, sources=..., targets=...)     the same through a head's values and output
    virtual.qk(4, 1, queries=..., keys=...)        how much a feature at the query looks for one at the key
    induction_pairs(subject)               pairs of a previous-token head and an induction head, by their weights

Every part of a model reads and writes one stream, so each pair of a writer and a reader has a weight between them: what
the reader makes of the writer's direction. No prompt is run, so a norm's scale, which depends on the prompt, is left
out (its weights and centring are folded in): numbers of one reader compare with each other, not with activations.

How it can mislead: a large weight between features that never fire together does nothing (interference; Ameisen et al.
2025), and a circuit in the weights may not be used. Positions are left out: rotary turns queries and keys, and whether
a head looks to the token before is not seen in these products. Composition scores are high between heads that share a
few strong directions of the stream, whatever they carry. Sources: Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"; Dunefsky et al. 2024 (arXiv:2406.11944).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.norms import NormWeights
from tomoscope.circuits.attribution.skeleton import Skeleton, find_skeleton
from tomoscope.errors import DataError, SiteError
from tomoscope.features import Transcoders
from tomoscope.model import Subject, Weights

PIECE = 4096
"""Features whose weights are held at once when the strongest are looked for."""


@dataclass(frozen=True)
class Link:
    """One virtual weight: a source feature, and how strongly it feeds the target asked about."""

    layer: int
    feature: int
    weight: float


class VirtualWeights:
    """Weights between a model's features (and any directions), without a prompt.

    Args:
        subject: a decoder.
        transcoders: for each of its layers; needed for what names features.
        skeleton: the model's linear parts, where they were found before.
    """

    def __init__(
        self, subject: Subject, transcoders: Transcoders | None = None, *, skeleton: Skeleton | None = None
    ) -> None:
        self.subject, self._transcoders = subject, transcoders
        self.skeleton = skeleton or find_skeleton(subject)
        self.dtype = torch.float64 if subject.dtype == torch.float64 else torch.float32

    @property
    def transcoders(self) -> Transcoders:
        """The dictionaries; raises DataError where there are none."""
        if self._transcoders is None:
            raise DataError("Features need dictionaries.", remedy="Give VirtualWeights(subject, transcoders).")
        return self._transcoders

    # ---- what features read and write

    def reads(self, layer: int, features: Int[Tensor, " row"] | None = None) -> Float[Tensor, "row d_model"]:
        """The directions in the stream that features read, the norm's weights folded in."""
        self._layer(layer)
        coder = self.transcoders.coder(layer)
        chosen = torch.arange(coder.n_features) if features is None else features
        rows = coder.encoder_rows(chosen, torch.zeros(0, dtype=self.dtype))
        norm = self.skeleton.blocks[layer].mlp_norm
        if self.transcoders.reads == "resid_mid" or norm is None:
            return rows
        weights = norm.weights
        if self.transcoders.reads == "normalized" and not weights.centred:
            weights = NormWeights(torch.ones_like(weights.weight), torch.zeros_like(weights.bias), False)
        return weights.fold(rows)

    def writes(
        self, layer: int, features: Int[Tensor, " row"] | None = None, *, to: int | None = None
    ) -> Float[Tensor, "row d_model"]:
        """The directions that features write.

        Args:
            layer: of the features.
            features: which; all by default.
            to: the layer whose MLP output is meant, for a cross-layer transcoder; its own by default.
        """
        self._layer(layer)
        chosen = torch.arange(self.transcoders.coder(layer).n_features) if features is None else features
        like = torch.zeros(0, dtype=self.dtype)
        return self.transcoders.decoder_rows(layer, chosen, layer if to is None else to, like)

    def features(
        self,
        source_layer: int,
        target_layer: int,
        *,
        sources: Int[Tensor, " source"] | None = None,
        targets: Int[Tensor, " target"] | None = None,
    ) -> Float[Tensor, "target source"]:
        """What one unit of each source adds to each target's pre-activation over the stream alone, up to a scale.

        Args:
            source_layer: below the target's (features of a parallel block's own layer do not see each other either).
            target_layer: of the targets.
            sources: which features; all by default.
            targets: which features; all by default.
        """
        if not source_layer < target_layer:
            raise SiteError(f"Features of layer {source_layer} do not feed those of layer {target_layer}.")
        read = self.reads(target_layer, targets)
        if len(self.transcoders.targets(source_layer)) == 1:
            return read @ self.writes(source_layer, sources).T
        met = [to for to in self.transcoders.targets(source_layer) if to < target_layer]
        return read @ torch.stack([self.writes(source_layer, sources, to=to) for to in met]).sum(0).T

    def strongest(self, target_layer: int, target: int, n: int = 10) -> list[Link]:
        """The features of all lower layers that feed one feature most, whatever the sign."""
        best: list[Link] = []
        read = torch.tensor([target])
        for layer in range(target_layer):
            for some in torch.arange(self.transcoders.coder(layer).n_features).split(PIECE):
                row = self.features(layer, target_layer, sources=some, targets=read)[0]
                top = row.abs().topk(min(n, len(row))).indices
                best += [Link(layer, int(some[i]), float(row[i])) for i in top]
        return sorted(best, key=lambda link: -abs(link.weight))[:n]

    # ---- through a head

    def ov(
        self,
        layer: int,
        head: int,
        *,
        sources: Float[Tensor, "source d_model"],
        targets: Float[Tensor, "target d_model"],
    ) -> Float[Tensor, "target source"]:
        """What a head, where it attends, moves from directions in the stream to readings of it.

        Args:
            layer, head: which head.
            sources: directions that are written (`writes`, token embeddings).
            targets: directions that are read (`reads`, unembedding columns).
        """
        parts = self._head(layer, head)
        W_V = parts.W_V[head * len(parts.W_V) // len(parts.W_O)].to(sources).T  # [head_dim, d_model]
        values = W_V if parts.attention_norm is None else parts.attention_norm.weights.fold(W_V)
        out = parts.W_O[head].to(sources) * parts.factor
        read = targets if parts.end_norm is None else parts.end_norm.weights.fold(targets)
        return (read @ out.T) @ (values @ sources.T)

    def qk(
        self,
        layer: int,
        head: int,
        *,
        queries: Float[Tensor, "query_row d_model"],
        keys: Float[Tensor, "key_row d_model"],
    ) -> Float[Tensor, "query_row key_row"]:
        """How much directions at the query look for directions at the key; positions and norms of queries left out.

        Args:
            layer, head: which head.
            queries: directions in the stream at the query.
            keys: directions in the stream at the key.
        """
        parts = self._head(layer, head)
        weights, norm = Weights(self.subject), parts.attention_norm
        W_Q, W_K = (one[layer][head].to(queries).T for one in (weights.W_Q, weights.W_K))
        if norm is not None:
            W_Q, W_K = norm.weights.fold(W_Q), norm.weights.fold(W_K)
        width = W_Q.shape[0]
        return (queries @ W_Q.T) @ (keys @ W_K.T).T / math.sqrt(width)

    def _layer(self, layer: int) -> None:
        if not 0 <= layer < len(self.skeleton.blocks):
            raise SiteError(f"There is no layer {layer}; the model has {len(self.skeleton.blocks)}.")

    def _head(self, layer: int, head: int) -> Any:
        self._layer(layer)
        parts = self.skeleton.blocks[layer]
        if not 0 <= head < len(parts.W_O):
            raise SiteError(f"There is no head {head} in layer {layer}; it has {len(parts.W_O)}.")
        return parts


# ---- heads


@dataclass(frozen=True)
class InductionPair:
    """Two heads whose weights would make an induction circuit.

    Attributes:
        previous: (layer, head) of the head whose output the other matches by.
        induction: (layer, head) of the head that matches and copies.
        composition: K-composition of the two, as a multiple of chance (1 for unrelated matrices).
        copying: of the second head, -1 to 1: whether what it attends to becomes more likely.
    """

    previous: tuple[int, int]
    induction: tuple[int, int]
    composition: float
    copying: float

    @property
    def score(self) -> float:
        """Composition beyond chance x copying; at most 0 is no sign of a circuit."""
        return max(0.0, self.composition - 1) * max(0.0, self.copying)


def composition_over_chance(subject: Subject, kind: str) -> Float[Tensor, "layer head layer_to head_to"]:
    """Composition scores as multiples of what unrelated matrices have, which is 1 / sqrt(d_model).

    Args:
        subject: a decoder.
        kind: "Q", "K" or "V".

    Returns:
        0 where the second head is not later, or where a head's weights are zero.
    """
    return Weights(subject).composition(kind).nan_to_num(0.0) * math.sqrt(subject.facts.d_model or 1)


@torch.no_grad()
def copying_scores(subject: Subject) -> Float[Tensor, "layer head"]:
    """Whether a head that attends to a token makes that token more likely: sum of the eigenvalues of W_E OV W_U over
    the sum of their absolute values, from -1 to 1 (Elhage et al. 2021).
    """
    weights = Weights(subject)
    through = (weights.W_U.float() @ weights.W_E.float()).cpu()  # [d_model, d_model]
    out = torch.zeros(subject.facts.n_layers, subject.facts.n_heads)
    for layer in range(subject.facts.n_layers):
        W_V, W_O = weights.W_V[layer].float().cpu(), weights.W_O[layer].float().cpu()
        values = torch.linalg.eigvals(W_O @ through @ W_V)  # the eigenvalues that are not zero
        out[layer] = values.real.sum(-1) / values.abs().sum(-1).clamp(min=1e-30)
    return out


def induction_pairs(subject: Subject, n: int = 5) -> list[InductionPair]:
    """The pairs of heads whose weights look most like an induction circuit, best first.

    An induction head matches by what an earlier head wrote (K-composition) and copies what it attends to. That the
    earlier head looks to the token before is not in these products: check it by attention (`observe.heads`).

    Args:
        subject: a decoder whose keys are made from the stream.
        n: how many.
    """
    composed, copying = composition_over_chance(subject, "K"), copying_scores(subject)
    n_layers, heads = copying.shape
    later = torch.arange(n_layers)[:, None, None, None] < torch.arange(n_layers)[None, None, :, None]
    score = ((composed - 1).clamp(min=0) * copying.clamp(min=0)).where(later, -1.0).flatten()
    found = []
    for place in score.topk(min(n, int(later.sum()) * heads**2)).indices.tolist():
        place, b = divmod(place, heads)
        place, to = divmod(place, n_layers)
        layer, a = divmod(place, heads)
        found.append(InductionPair((layer, a), (to, b), float(composed[layer, a, to, b]), float(copying[to, b])))
    return found
