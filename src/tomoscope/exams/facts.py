"""The exams of facts and their treatment."""

from __future__ import annotations

from tomoscope.exams.editing import EDITING

EXAMS = (EDITING,)
