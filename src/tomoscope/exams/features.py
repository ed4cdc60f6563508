"""The exams of features, in the order in which a reader wants them."""

from __future__ import annotations

from tomoscope.exams.dictionaries import CONCEPTS, STRUCTURE
from tomoscope.exams.feature_labels import LABELS

EXAMS = (STRUCTURE, CONCEPTS, LABELS)
