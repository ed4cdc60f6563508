"""Baselines: the training loss is the library's own, bounds and ranks are kept, nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from tests.treat.edit.made import FACTS, subject
from tomoscope.errors import EditError
from tomoscope.treat.edit.tune import TuneSettings, finetune, lora

SETTINGS = TuneSettings(steps=8, rate=2e-2, batch=2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_become_likely_and_the_model_is_unchanged(family):
    model = subject(family)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    for made, rank in (
        (finetune(model, FACTS, layers=[1], settings=SETTINGS), None),
        (finetune(model, FACTS, layers=[1], bound=1e-3, settings=SETTINGS), None),
        (lora(model, FACTS, layers=[0, 1], rank=2, settings=SETTINGS), 2),
    ):
        assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.model.parameters())
        assert made.notes["final loss"] < made.notes["first loss"]
        for change in made.treatment.changes.values():
            if rank is not None:
                assert change.left.shape[1] == rank
            elif made.treatment.origin.method == "FT-L":
                assert float(change.dense().abs().max()) <= 1e-3
    # the first loss is transformers' own
    losses = []
    for one in FACTS:
        ids = model.tokenizer(one.text)["input_ids"]
        target = model.tokenizer(f" {one.target_new}")["input_ids"]
        labels = torch.tensor([[-100] * len(ids) + target])
        with torch.no_grad():
            losses.append(float(model.model(input_ids=torch.tensor([ids + target]), labels=labels).loss))
    whole = finetune(model, FACTS, layers=[1], settings=TuneSettings(steps=1))
    assert whole.notes["first loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_same_seed_and_nonsense():
    model = subject("llama")
    one, other = (lora(model, FACTS, layers=[1], rank=2, settings=TuneSettings(steps=2), seed=3) for _ in range(2))
    (name,) = one.treatment.changes
    assert torch.equal(one.treatment.changes[name].dense(), other.treatment.changes[name].dense())
    with pytest.raises(EditError, match="bound"):
        finetune(model, FACTS, bound=0.0)
    with pytest.raises(EditError, match="rank"):
        lora(model, FACTS, rank=0)
    with pytest.raises(EditError, match="no layer 8"):
        finetune(model, FACTS, layers=[8])
    with pytest.raises(EditError, match="no layer"):
        finetune(model, FACTS, layers=[])
