"""The exams of features, in the order in which a reader wants them."""

from __future__ import annotations

from tomoscope.exams.feature_labels import LABELS

EXAMS = (LABELS,)
