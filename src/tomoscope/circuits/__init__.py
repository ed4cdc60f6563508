"""Circuits: which parts do it, shown by patching. Discovery and attribution graphs build on the same engines."""

from tomoscope.circuits.circuit import Agreement, Circuit, Comparison
from tomoscope.circuits.engine import PARTS, Engine
from tomoscope.circuits.graph import Graph, Node
from tomoscope.circuits.metrics import KL, LogitDifference, Metric, Probability, answer_log_probabilities, normalised
from tomoscope.circuits.patching import Pairs, PatchGrid, activation_patching, attribution_patching, encode_pairs
from tomoscope.circuits.tracing import Trace, causal_trace, noise_scale

__all__ = [
    "KL",
    "PARTS",
    "Agreement",
    "Circuit",
    "Comparison",
    "Engine",
    "Graph",
    "LogitDifference",
    "Metric",
    "Node",
    "Pairs",
    "PatchGrid",
    "Probability",
    "Trace",
    "activation_patching",
    "answer_log_probabilities",
    "attribution_patching",
    "causal_trace",
    "encode_pairs",
    "noise_scale",
    "normalised",
]
