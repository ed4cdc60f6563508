"""The exam of dead layers on the network that has some, on its twin, and where it has nothing to say."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.exams.world import random_subject
from tests.phantoms.test_deep import specimen
from tomoscope.errors import DataError
from tomoscope.exams import EXAMS, examine
from tomoscope.exams.dead_layers import labelled_as, layers, read_items

EXAM = EXAMS["concepts.dead_layers"]


def test_the_dead_half_is_confirmed_and_its_twin_refuted():
    found = {}
    for which in ("build", "null"):
        made = specimen(which)
        with labelled_as(made.data["labelled"]):
            (found[which],) = examine(EXAM, made.subject)
    dead, alive = found["build"], found["null"]
    assert dead.verdict == "confirmed", dead.reason
    assert dead.sites[-1] == "layers.15"
    assert dead.estimate.value < 0.02
    assert dead.controls[0].estimate.low > 0.5
    assert dead.figures
    assert alive.verdict == "refuted", alive.reason
    assert alive.estimate.low > 0.8


def test_items_of_a_file(tmp_path):
    made = specimen("build")
    x, y = made.data["labelled"]
    save_file({"inputs": x[:300].contiguous(), "labels": y[:300].contiguous()}, tmp_path / "items.safetensors")
    (finding,) = examine(EXAM, made.subject, options={"items": str(tmp_path / "items.safetensors")})
    assert finding.verdict == "confirmed", finding.reason
    save_file({"inputs": x[:5].contiguous()}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="labels"):
        read_items(str(tmp_path / "other.safetensors"))
    with pytest.raises(DataError, match="can't be read"):
        read_items(str(tmp_path / "none.safetensors"))


def test_where_it_has_nothing_to_say():
    made = specimen("build")
    (finding,) = examine(EXAM, made.subject)
    assert finding.verdict == "not measured"
    assert "no labelled inputs" in finding.reason
    x, y = made.data["labelled"]
    with labelled_as((x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))])):
        (finding,) = examine(EXAM, made.subject)
    assert "no accuracy to lose" in finding.reason
    assert layers(made.subject)[0] == "layers.0"
    assert "decoder" in EXAM.applies(random_subject("gpt2", 0))
