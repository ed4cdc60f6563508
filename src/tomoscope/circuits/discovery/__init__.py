"""Finding circuits: selection from scores, ACDC, learned masks."""

from tomoscope.circuits.discovery.acdc import ACDCRun, Step, acdc, acdc_sweep, edge_order, sweep_area
from tomoscope.circuits.discovery.masks import LearnedMask, learn_mask
from tomoscope.circuits.discovery.select import edges_above, greedy_edges, random_circuit, top_edges

__all__ = [
    "ACDCRun",
    "LearnedMask",
    "Step",
    "acdc",
    "acdc_sweep",
    "edge_order",
    "edges_above",
    "greedy_edges",
    "learn_mask",
    "random_circuit",
    "sweep_area",
    "top_edges",
]
