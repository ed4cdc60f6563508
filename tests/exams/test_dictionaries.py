"""Planted features are found and confirmed, their normal twin is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tomoscope.activations import ArraySource
from tomoscope.exams import EXAMS, examine
from tomoscope.exams.dictionaries import twin
from tomoscope.features.training import TrainConfig, finished_coder, train
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import superposition

OPTIONS = {"training_texts": 256, "texts": 64, "steps": 250}


def test_planted_features_are_recovered() -> None:
    specimen = superposition.build(0)
    rows, _ = specimen.data["sample"](16_384, 1)
    config = TrainConfig(latents=256, k=4, batch=1024, steps=500, learning_rate=1e-2, dead_after=20_000)
    (done,) = train(ArraySource(rows), config)
    found = normalize(finished_coder(done).W_dec, dim=1)
    best = (normalize(specimen.data["dictionary"], dim=1) @ found.T).amax(1)
    assert float(best.mean()) >= 0.95


@pytest.mark.parametrize("side", ["build", "null"])
def test_structure_is_confirmed_where_it_was_planted_and_only_there(side: str) -> None:
    specimen = getattr(PHANTOMS["superposition"], side)(1)
    (finding,) = examine(EXAMS["features.structure"], specimen.subject, options=OPTIONS, seed=3)
    assert (finding.verdict == "confirmed") is (side == "build"), finding.reason
    assert finding.controls[0].name == "a normal twin"


def test_the_twin_has_the_covariances_and_is_normal() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 600, (30_000,), generator=draw)
    rows = torch.randn(600, 4, generator=draw)[tokens] ** 3 + 0.3 * torch.randn(30_000, 4, generator=draw) + 5
    made = twin(rows, tokens, 1)
    torch.testing.assert_close(made.mean(0), rows.mean(0), atol=0.6, rtol=0)
    torch.testing.assert_close(made.T.cov(), rows.T.cov(), atol=2.5, rtol=0.2)
    one = tokens == 7
    assert float(made[one].var(0).mean()) < 0.5
    kurtosis = ((made - made.mean(0)) / made.std(0)).pow(4).mean(0)
    assert bool((kurtosis < 4).all())
