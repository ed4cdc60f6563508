"""Treatments: steer a model along directions, choose the dose by a declared rule, and tell what else it changed."""

from __future__ import annotations

from tomoscope.treat.bake import orthogonalised
from tomoscope.treat.dose import DoseCurve, DoseRule, choose_dose, dose_curve
from tomoscope.treat.export import read_control_vector, save_steering, write_control_vector
from tomoscope.treat.steer import clamp, contrast_direction, iti_heads, only_where, steering

__all__ = [
    "DoseCurve",
    "DoseRule",
    "choose_dose",
    "clamp",
    "contrast_direction",
    "dose_curve",
    "iti_heads",
    "only_where",
    "orthogonalised",
    "read_control_vector",
    "save_steering",
    "steering",
    "write_control_vector",
]
