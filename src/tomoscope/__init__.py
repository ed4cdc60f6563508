"""tomoscope: an MRI scanner for neural networks.

The face of the package is lazy: `import tomoscope` and `tomoscope --help` load neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_FACE = {
    "open_model": "tomoscope.model",
    "Subject": "tomoscope.model",
    "Site": "tomoscope.model",
    "add": "tomoscope.model",
    "replace": "tomoscope.model",
    "scale": "tomoscope.model",
    "zero": "tomoscope.model",
    "project_out": "tomoscope.model",
}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_FACE)]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'tomoscope' has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
