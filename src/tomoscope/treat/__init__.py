"""Treatments: values that change a model, are measured, undone to the bit, saved and merged; steering and its dose."""

from __future__ import annotations

from tomoscope.treat.bake import orthogonalised
from tomoscope.treat.dose import DoseCurve, DoseRule, choose_dose, dose_curve
from tomoscope.treat.export import read_control_vector, save_steering, write_control_vector
from tomoscope.treat.merge import merge_to
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

__all__ = [
    "Applied",
    "Dense",
    "DoseCurve",
    "DoseRule",
    "LowRank",
    "Origin",
    "Sparse",
    "Treatment",
    "choose_dose",
    "clamp",
    "contrast_direction",
    "difference",
    "dose_curve",
    "iti_heads",
    "load_treatment",
    "merge_to",
    "only_where",
    "orthogonalised",
    "read_control_vector",
    "save_steering",
    "steering",
    "treatment_of",
    "write_control_vector",
]
