"""What can't be trained is refused with the reason; schedules; a record goes to plain values and back."""

from __future__ import annotations

import json

import pytest
import torch

from tomoscope.errors import DataError
from tomoscope.features.training import TrainConfig
from tomoscope.features.training.parameters import Layout, Parameters

WRONG = {
    "jumprelu": {"architecture": "jumpreIu"}, "sparsity": {"sparsity": "l2"}, "step": {"sparsity": "step"},
    "target": {"architecture": "relu", "target_l0": 5}, "k is": {"k": 9000}, "skip": {"skip": True},
    "matryoshka": {"architecture": "matryoshka", "widths": (10, 20)}, "auxk": {"resample": (5,)},
    "as many": {"cross_layer": True, "reads": ("a", "b"), "writes": ("c",)}, "precision": {"precision": "int8"},
    "another site": {"centred": True, "writes": ("y",)}, "unit": {"decoder": "none"}, "no site": {"reads": ()},
    "positive": {"learning_rate": 0}, "at least 1": {"steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_mistakes(why: str) -> None:
    with pytest.raises(DataError, match=why):
        TrainConfig(**WRONG[why])


def test_schedules() -> None:
    config = TrainConfig(warmup=10, steps=100, learning_rate=1.0, sparsity_warmup=4, coefficient=2.0)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(50) == 1.0
    assert config.rate(90) == pytest.approx(0.5)
    assert [config.pressure(step) for step in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]


def test_a_record_goes_to_plain_values_and_back() -> None:
    config = TrainConfig(reads=("a", "b"), architecture="matryoshka", widths=(8, 64), latents=64, k=4)
    assert TrainConfig.from_document(json.loads(json.dumps(config.document()))) == config
    with pytest.raises(DataError, match="latent"):
        TrainConfig.from_document({"latent": 3})
    assert TrainConfig(reads=("x",), seed=1).title != TrainConfig(reads=("x",), seed=2).title


def test_encoder_rows_begin_short_where_latents_compete() -> None:
    for architecture, length in (("topk", 0.3), ("batchtopk", 0.3), ("relu", 1.0)):
        config = TrainConfig(architecture=architecture, latents=64, k=4, precision="float32")
        (part,) = Parameters.make(config, Layout((16,), (16,))).parts
        assert torch.allclose(part.W_enc.norm(dim=1), torch.tensor(length))
        assert torch.allclose(part.W_enc, length * part.W_dec)
