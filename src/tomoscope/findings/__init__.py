"""Records: what is claimed, and why to believe it. Imports no torch.

`Finding` is one claim with its estimate, control and verdict; `Ledger` is the folder of one run; `statistics`,
`permutation`, `control`, `corrections` and `verdict` make the numbers that stand behind a claim; `figures` are pictures
as data.
"""

from __future__ import annotations

from tomoscope.findings.calibration import Calibration, CalibrationRow, CalibrationTable
from tomoscope.findings.control import random_directions, random_subsets, shuffled_labels
from tomoscope.findings.corrections import benjamini_hochberg, holm
from tomoscope.findings.estimate import Estimate, format_number
from tomoscope.findings.figures import Figure
from tomoscope.findings.finding import Control, DataNote, FigureRef, Finding
from tomoscope.findings.ledger import Ledger
from tomoscope.findings.manifest import ExamRecord, Manifest
from tomoscope.findings.permutation import permutation_test, sign_flip_test
from tomoscope.findings.provenance import Provenance, collect_provenance
from tomoscope.findings.roc import clustered_share, roc_area, roc_interval
from tomoscope.findings.statistics import (
    bootstrap_interval,
    difference_interval,
    null_interval,
    null_p_value,
    ratio_interval,
    split_half,
    wilson_interval,
)
from tomoscope.findings.treatment import SideEffect, Treatment
from tomoscope.findings.verdict import Rule, correct, judge

__all__ = [
    "Calibration",
    "CalibrationRow",
    "CalibrationTable",
    "Control",
    "DataNote",
    "Estimate",
    "ExamRecord",
    "Figure",
    "FigureRef",
    "Finding",
    "Ledger",
    "Manifest",
    "Provenance",
    "Rule",
    "SideEffect",
    "Treatment",
    "benjamini_hochberg",
    "bootstrap_interval",
    "clustered_share",
    "collect_provenance",
    "correct",
    "difference_interval",
    "format_number",
    "holm",
    "judge",
    "null_interval",
    "null_p_value",
    "permutation_test",
    "random_directions",
    "random_subsets",
    "ratio_interval",
    "roc_area",
    "roc_interval",
    "shuffled_labels",
    "sign_flip_test",
    "split_half",
    "wilson_interval",
]
