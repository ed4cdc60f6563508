"""The exams of circuits, in the order in which a reader wants them."""

from __future__ import annotations

from tomoscope.exams.attribution_graphs import ATTRIBUTION_GRAPHS
from tomoscope.exams.discovery import DISCOVERY
from tomoscope.exams.patching import PATCHING
from tomoscope.exams.tracing import TRACING

EXAMS = (PATCHING, DISCOVERY, ATTRIBUTION_GRAPHS, TRACING)
