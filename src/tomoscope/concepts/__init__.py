"""What a model represents, where, and whether it uses it: probes, truth without labels, directions, erasure.

One `Direction` is read by probes, written by steering and removed by erasure. A concept is never told without its four
companions: selectivity, a null that pays for the search of layers, the most salient distractor, and an interval by
source of the items.
"""

from __future__ import annotations

from tomoscope.concepts.answers import completion_log_probs
from tomoscope.concepts.belief import Asked, Beliefs, beliefs, threshold_at, truth_direction
from tomoscope.concepts.between import (
    Composition,
    Cosines,
    ModelMap,
    composition,
    cosines,
    feature_direction,
    model_map,
)
from tomoscope.concepts.contrast import Contrast, Pairs, bimodality, ccs, crc_tpc, lat, vinc
from tomoscope.concepts.controls import description_length, distractors, selectivity, surface_states, transfer
from tomoscope.concepts.dead import DeadHalf, dead_layers
from tomoscope.concepts.direction import Direction, affine, load_direction
from tomoscope.concepts.erasure import Eraser, Moments, cross_covariance, equalise, inlp, one_hot, remaining
from tomoscope.concepts.judgement import Judgements, judgements
from tomoscope.concepts.linear import Linear, fit
from tomoscope.concepts.probes import Probes, train_probes
from tomoscope.concepts.similarity import cka, mutual_neighbours, permutation_null, procrustes, svcca
from tomoscope.concepts.special import attention_pooled, few_shot, sparse_probe
from tomoscope.concepts.states import States, collect, token_states
from tomoscope.concepts.truth import TruthDirections, truth_directions
from tomoscope.concepts.use import CausalEffect, causal_effect
from tomoscope.concepts.where import Candidate, Selected, Sweep, select_direction, sweep

__all__ = [
    "Asked",
    "Beliefs",
    "Candidate",
    "CausalEffect",
    "Composition",
    "Contrast",
    "Cosines",
    "DeadHalf",
    "Direction",
    "Eraser",
    "Judgements",
    "Linear",
    "ModelMap",
    "Moments",
    "Pairs",
    "Probes",
    "Selected",
    "States",
    "Sweep",
    "TruthDirections",
    "affine",
    "attention_pooled",
    "beliefs",
    "bimodality",
    "causal_effect",
    "ccs",
    "cka",
    "collect",
    "completion_log_probs",
    "composition",
    "cosines",
    "crc_tpc",
    "cross_covariance",
    "dead_layers",
    "description_length",
    "distractors",
    "equalise",
    "feature_direction",
    "few_shot",
    "fit",
    "inlp",
    "judgements",
    "lat",
    "load_direction",
    "model_map",
    "mutual_neighbours",
    "one_hot",
    "permutation_null",
    "procrustes",
    "remaining",
    "select_direction",
    "selectivity",
    "sparse_probe",
    "surface_states",
    "svcca",
    "sweep",
    "threshold_at",
    "token_states",
    "train_probes",
    "transfer",
    "truth_direction",
    "truth_directions",
    "vinc",
]
