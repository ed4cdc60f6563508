"""The world's concepts as features of the embedded model, with F1 counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tomoscope.exams import EXAMS, examine
from tomoscope.exams.feature_concepts import best_units, f1_by_text
from tomoscope.model import EMBEDDED, open_model

OPTIONS = {"training_texts": 192, "texts": 96, "steps": 150}


def test_concepts_of_the_world() -> None:
    (finding,) = examine(EXAMS["features.concepts"], open_model(EMBEDDED), options=OPTIONS)
    assert finding.verdict != "not measured", finding.reason
    assert 0.3 < finding.estimate.value < 1
    assert len(finding.controls) == 3
    assert max(control.estimate.value for control in finding.controls) < finding.estimate.value


def test_f1_is_that_of_a_count_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    concepts = torch.rand(400, 2, generator=draw) < 0.2
    units = torch.rand(400, 6, generator=draw)
    units[:, 3] = concepts[:, 1] * 2.0 + 0.2 * units[:, 3]
    unit, limit = best_units(units, concepts, 6)
    assert int(unit[1]) == 3
    told = units[:, unit] > limit
    text = np.repeat(np.arange(40), 10)
    got = f1_by_text(told, concepts, text, 40).mean(1)
    for i in range(2):
        hit = int((told[:, i] & concepts[:, i]).sum())
        assert got[i] == pytest.approx(2 * hit / int(told[:, i].sum() + concepts[:, i].sum()))
    assert got[1] > 0.95
