"""Findings to a report: `load_protocol` and `plan` say what to do, `run_scan` does it, `write_report` shows it."""

from __future__ import annotations

from tomoscope.scan.protocol import Protocol, Step, built_in_protocols, load_protocol, parse_protocol, plan
from tomoscope.scan.report import render_report, write_report
from tomoscope.scan.runner import Observer, run_scan

__all__ = [
    "Observer",
    "Protocol",
    "Step",
    "built_in_protocols",
    "load_protocol",
    "parse_protocol",
    "plan",
    "render_report",
    "run_scan",
    "write_report",
]
