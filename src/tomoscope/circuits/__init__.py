"""Circuits: which parts do it, which edges between them, and the proof.

- `graph`: sources, destinations, edges; `metrics`: what judges a run; `circuit`, `formats`: a circuit and its files.
- `patching`: single places put back or taken away, paths between them, noise and what recovers from it.
- `wiring`: the model with any edges kept and the rest ablated; `scores`: how much each edge or node matters.
- `discovery`: circuits from scores, by ACDC, by learned masks.
- `proof`: faithfulness, completeness, controls; stated hypotheses (causal scrubbing, interchange interventions).
- `attribution`: one prompt, feature by feature; `virtual`: from weights alone.
"""

from tomoscope.circuits.circuit import Agreement, Circuit, Comparison
from tomoscope.circuits.discovery.acdc import ACDCRun, acdc, acdc_sweep
from tomoscope.circuits.discovery.masks import LearnedMask, learn_mask
from tomoscope.circuits.discovery.select import edges_above, greedy_edges, random_circuit, top_edges
from tomoscope.circuits.graph import Graph, Node
from tomoscope.circuits.metrics import KL, LogitDifference, Metric, Probability, answer_log_probabilities, normalised
from tomoscope.circuits.patching.activation import (
    Pairs,
    PatchGrid,
    activation_patching,
    attribution_patching,
    encode_pairs,
)
from tomoscope.circuits.patching.atp import NodeGrid, atp_star
from tomoscope.circuits.patching.engine import PARTS, Engine
from tomoscope.circuits.patching.path import PathEffects, path_patching
from tomoscope.circuits.patching.tracing import Trace, causal_trace, noise_scale, severed_trace
from tomoscope.circuits.proof.completeness import (
    Completeness,
    Minimality,
    Stability,
    completeness,
    minimality,
    stability,
)
from tomoscope.circuits.proof.faithfulness import Areas, Faithfulness, faithfulness_curve, measure, random_faithfulness
from tomoscope.circuits.proof.interchange import (
    Alignment,
    Interchanges,
    align,
    interchange_accuracy,
    interchange_logits,
    random_alignment,
)
from tomoscope.circuits.proof.scrubbing import Claim, Scrubbed, scrub
from tomoscope.circuits.scores.edges import EdgeScores, edge_scores
from tomoscope.circuits.scores.nodes import NodeScores, neuron_scores, node_scores
from tomoscope.circuits.wiring.ablation import Ablation, Choices
from tomoscope.circuits.wiring.wiring import Wiring

__all__ = [
    "KL",
    "PARTS",
    "ACDCRun",
    "Ablation",
    "Agreement",
    "Alignment",
    "Areas",
    "Choices",
    "Circuit",
    "Claim",
    "Comparison",
    "Completeness",
    "EdgeScores",
    "Engine",
    "Faithfulness",
    "Graph",
    "Interchanges",
    "LearnedMask",
    "LogitDifference",
    "Metric",
    "Minimality",
    "Node",
    "NodeGrid",
    "NodeScores",
    "Pairs",
    "PatchGrid",
    "PathEffects",
    "Probability",
    "Scrubbed",
    "Stability",
    "Trace",
    "Wiring",
    "acdc",
    "acdc_sweep",
    "activation_patching",
    "align",
    "answer_log_probabilities",
    "atp_star",
    "attribution_patching",
    "causal_trace",
    "completeness",
    "edge_scores",
    "edges_above",
    "encode_pairs",
    "faithfulness_curve",
    "greedy_edges",
    "interchange_accuracy",
    "interchange_logits",
    "learn_mask",
    "measure",
    "minimality",
    "neuron_scores",
    "node_scores",
    "noise_scale",
    "normalised",
    "path_patching",
    "random_alignment",
    "random_circuit",
    "random_faithfulness",
    "scrub",
    "severed_trace",
    "stability",
    "top_edges",
]
