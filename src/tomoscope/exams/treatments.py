"""The exams of treatments and of what calls for one."""

from __future__ import annotations

from tomoscope.exams.removing import REMOVAL
from tomoscope.exams.watching import WATCH

EXAMS = (WATCH, REMOVAL)
"""In the order in which a scan runs them."""
