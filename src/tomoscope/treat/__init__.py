"""Treatments: values that change a model, are measured, undone to the bit, saved and merged; steering and its dose."""

from __future__ import annotations

from tomoscope.treat.bake import orthogonalised
from tomoscope.treat.cause import Cause, Choices, find_cause, rank_parts
from tomoscope.treat.dose import DoseCurve, DoseRule, choose_dose, dose_curve
from tomoscope.treat.edit.effects import Answers, Measures, Score, compare, measure
from tomoscope.treat.edit.keys import Edited, contexts_of
from tomoscope.treat.edit.memit import alphaedit, memit
from tomoscope.treat.edit.moments import MomentPoint, SecondMoments, second_moments
from tomoscope.treat.edit.requests import EditRequest, Probe, read_counterfact, read_requests, read_zsre
from tomoscope.treat.edit.rome import rome
from tomoscope.treat.edit.targets import Targets, TargetSettings, find_targets
from tomoscope.treat.edit.tune import TuneSettings, finetune, lora
from tomoscope.treat.export import read_control_vector, save_steering, write_control_vector
from tomoscope.treat.merge import merge_to
from tomoscope.treat.remove import remove_directions, remove_heads, remove_neurons, remove_parts
from tomoscope.treat.steer import clamp, contrast_direction, iti_heads, only_where, steering
from tomoscope.treat.treatment import (
    Applied,
    Dense,
    LowRank,
    Origin,
    Sparse,
    Treatment,
    difference,
    load_treatment,
    treatment_of,
)
from tomoscope.treat.watch import Normal, Seen, Watch, fit_watch, oas

__all__ = [
    "Answers",
    "Applied",
    "Cause",
    "Choices",
    "Dense",
    "DoseCurve",
    "DoseRule",
    "EditRequest",
    "Edited",
    "LowRank",
    "Measures",
    "MomentPoint",
    "Normal",
    "Origin",
    "Probe",
    "Score",
    "SecondMoments",
    "Seen",
    "Sparse",
    "TargetSettings",
    "Targets",
    "Treatment",
    "TuneSettings",
    "Watch",
    "alphaedit",
    "choose_dose",
    "clamp",
    "compare",
    "contexts_of",
    "contrast_direction",
    "difference",
    "dose_curve",
    "find_cause",
    "find_targets",
    "finetune",
    "fit_watch",
    "iti_heads",
    "load_treatment",
    "lora",
    "measure",
    "memit",
    "merge_to",
    "oas",
    "only_where",
    "orthogonalised",
    "rank_parts",
    "read_control_vector",
    "read_counterfact",
    "read_requests",
    "read_zsre",
    "remove_directions",
    "remove_heads",
    "remove_neurons",
    "remove_parts",
    "rome",
    "save_steering",
    "second_moments",
    "steering",
    "treatment_of",
    "write_control_vector",
]
