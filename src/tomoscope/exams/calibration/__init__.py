"""How far an exam can be believed: each run on models whose answer is known, and on their nulls.

The design, in the order of the work:

- `sources`: names and seeds to specimens: each phantom, its null, untrained weights, shuffled answers.
- `truth`: a specimen's card to what must come out of each exam: which claims are true, which false, and where.
- `runner`: each exam on each specimen, one line a piece, resumable.
- `scoring`: lines to sensitivity, specificity, right places and ROC area, for each exam and kind of claim, with
  intervals by specimen, as claims about one model are not independent.
- `lookup`: the table that ships with the package, to what stands beside a finding.

How it can mislead: a phantom is easier than a trained model, or harder; a row says which phantoms stand behind it. A
claim that no phantom decides is missing, and says why.
"""

from __future__ import annotations

from tomoscope.exams.calibration.lookup import calibration_of, shipped_calibration
from tomoscope.exams.calibration.runner import PRESETS, Watcher, calibrate, plan_calibration
from tomoscope.exams.calibration.scoring import evidence
from tomoscope.exams.calibration.truth import TRUTHS, Expected, Place, Truth

__all__ = [
    "PRESETS",
    "TRUTHS",
    "Expected",
    "Place",
    "Truth",
    "Watcher",
    "calibrate",
    "calibration_of",
    "evidence",
    "plan_calibration",
    "shipped_calibration",
]
