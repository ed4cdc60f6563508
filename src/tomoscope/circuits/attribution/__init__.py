"""Attribution graphs: what each feature of a prompt adds to which, by linear attribution through a frozen model.

The design, one file an idea:

- `norms`, `skeleton`: a model's norms and attention as linear maps, found and checked in any family; `patterns`.
- `replacement`: a prompt's local replacement model (features, errors, tokens, constants).
- `folded`, `sweep`: one top-down sweep for any number of rows; `targets`: which rows, and what each sums to.
- `rows`, `graph`, `build`, `ranked`: the graph, whole or expanded from the logits on.
- `influence`, `threshold`: influence, pruning, scores; `supernodes`; `formats`: files.
- `interventions`: features set to other values in the model itself; `predictions`: what the graph says of it.
- `heads_read`, `qk`: why a head attends.
- `feature_effects`, `sparse_circuits`, `shift`: features of sparse autoencoders over many prompts; their removal.
"""

from tomoscope.circuits.attribution.build import attribution_graph
from tomoscope.circuits.attribution.feature_effects import FeatureEffects, feature_effects
from tomoscope.circuits.attribution.formats import (
    FoundGraph,
    load,
    read_neuronpedia,
    save,
    to_neuronpedia,
    write_neuronpedia,
)
from tomoscope.circuits.attribution.graph import AttributionGraph, GraphNode
from tomoscope.circuits.attribution.influence import Pruned, Scores, node_influence, prune, scores
from tomoscope.circuits.attribution.interventions import Intervention, Outcome, intervene
from tomoscope.circuits.attribution.predictions import InterventionCheck, check_interventions, predict, suppress
from tomoscope.circuits.attribution.qk import QKAttribution, qk_attribution
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.shift import Shift, shift
from tomoscope.circuits.attribution.sparse_circuits import SparseCircuit, faithfulness, sparse_circuit
from tomoscope.circuits.attribution.supernodes import Merged, Supernode, merge, same_features
from tomoscope.circuits.attribution.sweep import Rows, Sweep
from tomoscope.circuits.attribution.targets import LogitTargets, direction_targets, logit_targets

__all__ = [
    "AttributionGraph",
    "FeatureEffects",
    "FoundGraph",
    "GraphNode",
    "Intervention",
    "InterventionCheck",
    "LocalReplacement",
    "LogitTargets",
    "Merged",
    "Outcome",
    "Pruned",
    "QKAttribution",
    "Rows",
    "Scores",
    "Shift",
    "SparseCircuit",
    "Supernode",
    "Sweep",
    "attribution_graph",
    "check_interventions",
    "direction_targets",
    "faithfulness",
    "feature_effects",
    "intervene",
    "load",
    "logit_targets",
    "merge",
    "node_influence",
    "predict",
    "prune",
    "qk_attribution",
    "read_neuronpedia",
    "same_features",
    "save",
    "scores",
    "shift",
    "sparse_circuit",
    "suppress",
    "to_neuronpedia",
    "write_neuronpedia",
]
