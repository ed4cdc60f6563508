"""The exams of concepts, in the order in which a reader wants them."""

from __future__ import annotations

from tomoscope.exams.dead_layers import DEAD
from tomoscope.exams.lying import LIES
from tomoscope.exams.probing import PROBES

EXAMS = (PROBES, LIES, DEAD)
