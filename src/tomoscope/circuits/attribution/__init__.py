"""Attribution graphs: what each feature of a prompt adds to which, by linear attribution through a frozen model.

The design, one file an idea:

- `norms`, `skeleton`: a model's norms and attention as linear maps, found and checked in any family; `patterns`.
- `replacement`: a prompt's local replacement model (features, errors, tokens, constants).
- `folded`, `sweep`: one top-down sweep for any number of rows; `targets`: which rows, and what each sums to.
- `rows`, `graph`, `build`, `ranked`: the graph, whole or expanded from the logits on.
- `influence`, `threshold`: influence, pruning, scores.
- `interventions`: features set to other values in the model itself.
"""

from tomoscope.circuits.attribution.build import attribution_graph
from tomoscope.circuits.attribution.graph import AttributionGraph, GraphNode
from tomoscope.circuits.attribution.influence import Pruned, Scores, node_influence, prune, scores
from tomoscope.circuits.attribution.interventions import Intervention, Outcome, intervene
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.sweep import Rows, Sweep
from tomoscope.circuits.attribution.targets import LogitTargets, direction_targets, logit_targets

__all__ = [
    "AttributionGraph",
    "GraphNode",
    "Intervention",
    "LocalReplacement",
    "LogitTargets",
    "Outcome",
    "Pruned",
    "Rows",
    "Scores",
    "Sweep",
    "attribution_graph",
    "direction_targets",
    "intervene",
    "logit_targets",
    "node_influence",
    "prune",
    "scores",
]
