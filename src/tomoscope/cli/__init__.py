"""The command line: `tomoscope scan | show | calibrate | doctor | sites`, one file per command."""

from __future__ import annotations

__all__: list[str] = []
