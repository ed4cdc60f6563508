"""Findings to a report: `load_protocol` and `plan` say what to do, `run_scan` does it, `write_report` shows it.

`scan_model` is all of these in one call, and `load_report` reads a run back.
"""

from __future__ import annotations

from tomoscope.scan.calls import load_report, scan_model
from tomoscope.scan.protocol import Protocol, Step, built_in_protocols, load_protocol, parse_protocol, plan
from tomoscope.scan.report import render_report, write_report
from tomoscope.scan.runner import Observer, run_scan

__all__ = [
    "Observer",
    "Protocol",
    "Step",
    "built_in_protocols",
    "load_protocol",
    "load_report",
    "parse_protocol",
    "plan",
    "render_report",
    "run_scan",
    "scan_model",
    "write_report",
]
