"""Activations to findings: an exam is a method with its control, and makes a claim.

`Exam` is the contract, `Context` what an exam's `run` is given, `EXAMS` the exams there are (imported when first asked
for), `examine` runs one by itself.
"""

from __future__ import annotations

from tomoscope.exams.exam import Context, Exam, Options, examine
from tomoscope.exams.registry import EXAMS, register

__all__ = ["EXAMS", "Context", "Exam", "Options", "examine", "register"]
