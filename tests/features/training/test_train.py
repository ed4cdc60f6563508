"""Every architecture finds planted features; a killed run ends bit by bit as one that was not; the export is the
same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.features.training.planted import best_cosines, planted
from tomoscope.activations import ArraySource
from tomoscope.errors import DataError
from tomoscope.features.training import (
    DictionaryTraining,
    TrainConfig,
    Training,
    finished_coder,
    finished_cross_layer,
    train,
)

BASE = {"reads": ("",), "latents": 64, "batch": 512, "steps": 700, "learning_rate": 1e-2, "sparsity_warmup": 100}
ALL = {
    "topk": {"architecture": "topk", "k": 3},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "matryoshka": {"architecture": "matryoshka", "k": 3, "widths": (32, 64)},
    "relu": {"architecture": "relu", "coefficient": 2.0},
    "relu tanh": {"architecture": "relu", "sparsity": "tanh", "coefficient": 1.0},
    "gated": {"architecture": "gated", "coefficient": 3.0},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 3.0, "coefficient": 3.0, "bandwidth": 0.3},
}


@pytest.mark.parametrize("name", ALL)
def test_planted_features_are_found(name: str) -> None:
    rows, dictionary = planted()
    config = TrainConfig(**BASE, **ALL[name], precision="float32" if name == "topk" else "bfloat16")
    (done,) = train(ArraySource(rows, seed=1), config)
    coder = finished_coder(done)
    fresh, _ = planted(seed=9)
    error = (coder(fresh) - fresh).square().sum() / (fresh - fresh.mean(0)).square().sum()
    cosines = best_cosines(coder.W_dec, dictionary)
    l0 = float((coder.encode(fresh) > 0).sum(1).double().mean())
    assert float(error) < 0.25
    assert float(cosines.mean()) > (0.85 if name in ("matryoshka", "relu tanh") else 0.92)
    assert 1 < l0 < 8


def test_side_by_side_is_as_alone() -> None:
    rows, _ = planted(2048)
    configs = [TrainConfig(**(BASE | {"steps": 12}), architecture="topk", k=k) for k in (2, 5)]
    together = train(ArraySource(rows), configs)
    for config, one in zip(configs, together, strict=True):
        (alone,) = train(ArraySource(rows), config)
        for name, value in alone.tensors().items():
            assert torch.equal(value, one.tensors()[name]), name


@pytest.mark.parametrize("name", ["batchtopk", "gated", "jumprelu", "topk"])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = planted(3000)
    options = BASE | ALL[name] | {"steps": 31, "dead_after": 4000}
    if name == "gated":
        options["resample"] = (9, 22)
    config = TrainConfig(**options)
    whole = Training(ArraySource(rows, seed=3), [config], folder=tmp_path / "whole", every=7, log_every=1)
    whole.run()

    real, count = DictionaryTraining.step, 0

    class Killed(BaseException):
        pass

    def dying(self, values):
        nonlocal count
        count += 1
        if count % 13 == 0:
            raise Killed
        return real(self, values)

    monkeypatch.setattr(DictionaryTraining, "step", dying)
    for _ in range(20):
        run = Training(ArraySource(rows, seed=3), [config], folder=tmp_path / "s", every=7, log_every=1)
        try:
            run.run()
            break
        except Killed:
            continue
    assert count > 31
    for key, value in whole.dictionaries[0].tensors().items():
        assert torch.equal(value, run.dictionaries[0].tensors()[key]), key
    lines = [
        [json.loads(line) for line in (tmp_path / d / "figures.jsonl").read_text().splitlines()] for d in ("whole", "s")
    ]
    plain = [[{k: v for k, v in line.items() if k != "rows_per_second"} for line in one] for one in lines]
    assert plain[0] == plain[1]
    assert [line["step"] for line in plain[0]] == list(range(1, 32))


def test_transcoders_and_crosscoders() -> None:
    rows, _ = planted(4096)
    turn = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)) / 5
    values = {"in": rows, "out": torch.relu(rows) @ turn, "b": rows[:, :20] * 7}
    common = BASE | {"steps": 250, "architecture": "topk", "k": 6}
    configs = [
        TrainConfig(**(common | {"reads": ("in",), "writes": ("out",), "name": "plain", "decoder": "free"})),
        TrainConfig(**(common | {"reads": ("in",), "writes": ("out",), "skip": True, "name": "skip"})),
        TrainConfig(**(common | {"reads": ("in", "b"), "name": "cross"})),
    ]
    plain, skip, cross = map(finished_coder, train(ArraySource(values), configs))

    def missed(coder, x, y) -> float:
        return float((coder(x) - y).square().sum() / (y - y.mean(0)).square().sum())

    assert missed(plain, rows, values["out"]) < 0.5
    assert missed(skip, rows, values["out"]) < missed(plain, rows, values["out"])
    both = torch.cat([rows, values["b"]], 1)
    assert missed(cross, both, both) < 0.3
    assert cross.d_in == 44


def test_a_cross_layer_transcoder_is_its_export() -> None:
    rows, _ = planted(4096)
    draw = torch.Generator().manual_seed(1)
    mixed = [rows, torch.tanh(rows @ torch.randn(24, 24, generator=draw))]
    out = [torch.relu(mixed[0]), torch.relu(mixed[1]) + 0.5 * torch.relu(mixed[0])]
    values = {"in0": mixed[0], "in1": mixed[1] * 5, "out0": out[0], "out1": out[1] * 3}
    config = TrainConfig(
        **(BASE | {"steps": 150, "reads": ("in0", "in1"), "writes": ("out0", "out1"), "k": 6, "decoder": "free"}),
        cross_layer=True, precision="float32",
    )  # fmt: skip
    (done,) = train(ArraySource(values), config)
    made = finished_cross_layer(done)
    codes = [made.coder(layer).encode(values[f"in{layer}"]) for layer in (0, 1)]
    x, _ = done.inputs(values)
    scaled = done.reconstruct(x)
    for layer in (0, 1):
        mine = made.reconstruct(codes, layer)
        expected = scaled[:, layer * 24 : (layer + 1) * 24] / done.scale[f"out{layer}"]
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)
        y = values[f"out{layer}"]
        assert float((mine - y).square().sum() / (y - y.mean(0)).square().sum()) < 0.5


def test_mistakes_are_told_before_the_work(tmp_path: Path) -> None:
    rows, _ = planted(1000)
    config = TrainConfig(**(BASE | {"steps": 2}))
    with pytest.raises(DataError, match="no site 'nowhere'"):
        train(ArraySource(rows), TrainConfig(**(BASE | {"reads": ("nowhere",)})))
    with pytest.raises(DataError, match="too few"):
        train(ArraySource(rows[:100]), config)
    with pytest.raises(DataError, match="one batch size"):
        train(ArraySource(rows), [])
    with pytest.raises(DataError, match="one name"):
        train(ArraySource(rows), [config, config])
    train(ArraySource(rows), config, folder=tmp_path)
    with pytest.raises(DataError, match="another training"):
        train(ArraySource(rows), TrainConfig(**(BASE | {"steps": 3})), folder=tmp_path)
    rows[0, 0] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        train(ArraySource(rows), TrainConfig(**(BASE | {"steps": 3, "normalise": False})))
