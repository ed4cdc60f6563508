"""tomoscope: an MRI scanner for neural networks.

The names that most work needs, in one place; each package has the rest. The face is lazy: `import tomoscope` and
`tomoscope --help` load neither torch nor transformers, and a name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tomoscope.circuits import activation_patching, attribution_patching, causal_trace
    from tomoscope.data import TASKS, Corpus, Item, Pair, PairSet, Prompt
    from tomoscope.errors import TomoscopeError
    from tomoscope.exams.calibration import calibrate
    from tomoscope.findings import Finding, Ledger
    from tomoscope.model import (
        EMBEDDED,
        Activations,
        Edit,
        Site,
        Subject,
        add,
        noise,
        open_model,
        project_out,
        replace,
        scale,
        zero,
    )
    from tomoscope.observe import direct_logit_attribution, logit_lens
    from tomoscope.scan import load_report, scan_model

_HOMES = {
    "circuits": ("activation_patching", "attribution_patching", "causal_trace"),
    "data": ("TASKS", "Corpus", "Item", "Pair", "PairSet", "Prompt"),
    "errors": ("TomoscopeError",),
    "exams.calibration": ("calibrate",),
    "findings": ("Finding", "Ledger"),
    "model": (
        "EMBEDDED", "Activations", "Edit", "Site", "Subject", "add", "noise", "open_model", "project_out", "replace",
        "scale", "zero",
    ),
    "observe": ("direct_logit_attribution", "logit_lens"),
    "scan": ("load_report", "scan_model"),
}  # fmt: skip
_FACE = {name: f"tomoscope.{home}" for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "EMBEDDED",
    "TASKS",
    "Activations",
    "Corpus",
    "Edit",
    "Finding",
    "Item",
    "Ledger",
    "Pair",
    "PairSet",
    "Prompt",
    "Site",
    "Subject",
    "TomoscopeError",
    "__version__",
    "activation_patching",
    "add",
    "attribution_patching",
    "calibrate",
    "causal_trace",
    "direct_logit_attribution",
    "load_report",
    "logit_lens",
    "noise",
    "open_model",
    "project_out",
    "replace",
    "scale",
    "scan_model",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'tomoscope' has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
