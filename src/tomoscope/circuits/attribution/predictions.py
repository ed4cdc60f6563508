"""What a graph says that an intervention does, beside what it does.

    check_interventions(graph, replacement, [suppress(graph, [3, 17])], mode="iterative")

Prediction: a feature's change moves its targets by weight x change / activation; those that are features move on in
their turn (a feature does not fall below 0), layer by layer. With everything frozen ("constrained") only the first step
is made, and prediction and outcome agree to rounding; with MLPs that react ("iterative", "free") the agreement is what
tests the graph: how far the features stand for the model.

How it can mislead: a feature that was silent and wakes up is in no graph; agreement over many small interventions says
little of a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.attribution.graph import AttributionGraph
from tomoscope.circuits.attribution.interventions import Intervention, intervene
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.targets import find_head
from tomoscope.errors import SiteError


def suppress(graph: AttributionGraph, nodes: Sequence[int], factor: float = 0.0) -> list[Intervention]:
    """Set some of a graph's features to a multiple of what they are.

    Args:
        graph: the graph.
        nodes: numbers of features.
        factor: 0 takes them away, -2 is the field's strong suppression, 2 doubles them.
    """
    out = []
    for number in nodes:
        node = graph.node(number)
        if node.kind != "feature":
            raise SiteError(f"{node.name} is no feature, so it can't be set.")
        out.append(Intervention(node.layer, node.position, node.index, factor, relative=True))
    return out


def predict(
    graph: AttributionGraph, interventions: Sequence[Intervention], *, react: bool = True
) -> Float[Tensor, " row"]:
    """The change of every feature's pre-activation and of every logit that a graph predicts.

    Args:
        graph: the graph.
        interventions: on features that are nodes of it, at named positions.
        react: features that change move on what they add to others; else only direct effects.

    Returns:
        [row], features then logits. An intervened feature's own entry is what would reach it.

    Raises:
        SiteError: an intervention on what is no node.
    """
    change = torch.zeros(graph.n_features, dtype=graph.weights.dtype)
    fixed = torch.zeros(graph.n_features, dtype=torch.bool)
    for one in interventions:
        if one.position is None:
            raise SiteError("A prediction needs the position of each intervention.")
        number = graph.number_of(one.layer, one.position, one.feature)
        was = graph.activations[number]
        change[number] = (was * one.value if one.relative else one.value) - was
        fixed[number] = True
    moved = torch.zeros_like(graph.values)
    from_feature = graph.columns < graph.n_features
    layers = torch.cat([graph.features[:, 0], torch.full((graph.n_logits,), graph.n_layers)])
    bounds = torch.searchsorted(layers, torch.arange(graph.n_layers + 2)).tolist()
    for layer in range(graph.n_layers + 1):
        rows = slice(bounds[layer], bounds[layer + 1])
        some = torch.arange(int(graph.starts[rows.start]), int(graph.starts[rows.stop]))
        some = some[from_feature[some]]
        source = graph.columns[some].long()
        moved.index_add_(0, graph.edge_rows[some], graph.weights[some] * change[source] / graph.activations[source])
        if react and layer < graph.n_layers:
            free = ~fixed[rows]
            new = (graph.activations[rows] + moved[rows]).clamp(min=0) - graph.activations[rows]
            change[rows] = torch.where(free, new, change[rows])
    return moved


@dataclass(frozen=True, eq=False)
class InterventionCheck:
    """Predicted and actual changes.

    Attributes:
        predicted: [set, row].
        actual: [set, row].
        logit: [row], which rows are logits (less the mean logit, before a soft-cap); the others are pre-activations.
        compared: [set, row], False for the features that were set.
        mode: of the intervention.
    """

    predicted: Float[Tensor, "set row"]
    actual: Float[Tensor, "set row"]
    logit: Bool[Tensor, " row"]
    compared: Bool[Tensor, "set row"]
    mode: str

    def correlation(self, *, logits: bool = True) -> float:
        """Pearson's, over sets and logits (or features); nan where there are fewer than three numbers."""
        some = self.compared & (self.logit if logits else ~self.logit)
        x, y = self.predicted[some].double(), self.actual[some].double()
        if len(x) < 3:
            return float("nan")
        return float(torch.corrcoef(torch.stack([x, y]))[0, 1])

    def unexplained(self, *, logits: bool = True) -> float:
        """Squared error of the prediction / squared change: 0 is exact, 1 is as good as predicting no change."""
        some = self.compared & (self.logit if logits else ~self.logit)
        wrong = (self.predicted - self.actual)[some].double().square().sum()
        return float(wrong / self.actual[some].double().square().sum().clamp(min=1e-300))


@torch.no_grad()
def check_interventions(
    graph: AttributionGraph,
    replacement: LocalReplacement,
    sets: Sequence[Sequence[Intervention]],
    *,
    mode: str = "iterative",
) -> InterventionCheck:
    """Make interventions and set beside each other what the graph predicts and what comes of them.

    Args:
        graph: of this prompt, with logits that are tokens.
        replacement: the prompt's local replacement model.
        sets: sets of interventions, each run by itself.
        mode: as in `intervene`.
    """
    ids = torch.tensor(graph.logit_ids)
    if bool((ids >= len(replacement.logits)).any()):
        raise SiteError("This graph explains directions that are no tokens, so no logit shows their change.")
    predicted = torch.stack([predict(graph, some, react=mode != "constrained") for some in sets])
    layers = sorted({*graph.features[:, 0].tolist()})
    outcome = intervene(replacement, [*sets, []], mode=mode, read=layers)
    actual = torch.zeros(len(sets) + 1, len(graph.values), dtype=graph.values.dtype)
    for layer in layers:
        mine = torch.nonzero(graph.features[:, 0] == layer)[:, 0]
        read = outcome.preactivations(layer).cpu()
        actual[:, mine] = read[:, graph.features[mine, 1], graph.features[mine, 2]].to(actual)
    logits = find_head(replacement).uncapped(outcome.last)
    logits = (logits - logits.mean(-1, keepdim=True)).cpu()
    actual[:, graph.n_features :] = logits[:, ids].to(actual)
    compared = torch.ones(len(sets), len(graph.values), dtype=torch.bool)
    for row, some in enumerate(sets):
        for one in some:
            compared[row, graph.number_of(one.layer, one.position or 0, one.feature)] = False
    logit = torch.arange(len(graph.values)) >= graph.n_features
    return InterventionCheck(predicted, actual[:-1] - actual[-1], logit, compared, mode)
