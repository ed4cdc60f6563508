"""Training: the chunked loss against torch's own, rows that follow from the seed, a killed run that goes on exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from training.micro_world import Recipe
from transformers import AutoTokenizer

from tomoscope.model import EMBEDDED
from tomoscope.phantoms.world import shipped_world
from training import abilities, loss, micro_world, rows

TINY = Recipe(
    steps=6, rows=2, context=32, layers=1, d_model=32, heads=2, d_mlp=32, look_back_heads=1, warm_up=2,
    pool_grows=(1, 4), autocast=False,
)  # fmt: skip


def test_the_chunked_loss_is_torch_s_own(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (30,))
    counts = torch.rand(30) + 0.1
    ours = loss.tied_cross_entropy(hidden, weight, targets, counts=counts, dtype=torch.float32)
    (2 * ours).backward()
    mine = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    theirs = (cross_entropy(hidden @ weight.T, targets, reduction="none") * counts).sum() / counts.sum()
    (2 * theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine, (hidden.grad, weight.grad))


def test_random_rows_repeat():
    from random import Random

    row = rows.random_row(Random(0), list(range(1, 65)), 128)
    pairs = list(pairwise(row))
    assert len(row) == 128
    assert len(set(pairs)) < 80 < len(pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An output folder that has the shipped tokenizer already, so that no test trains one."""

    def make(name: str):
        out = tmp_path_factory.mktemp(name)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(out / "model")
        return out

    return make


@pytest.fixture(autouse=True)
def few_items(monkeypatch):
    monkeypatch.setattr(abilities, "ABILITIES", dict(list(abilities.ABILITIES.items())[:2]))


def test_a_killed_run_goes_on_to_the_same_weights(folder, capsys):
    whole, broken = folder("whole"), folder("broken")
    micro_world.train(TINY, whole, checkpoint_every=3, log_every=3)
    real = micro_world.loss_of
    calls = []

    def dies(*args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    micro_world.loss_of = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            micro_world.train(TINY, broken, checkpoint_every=3, log_every=3)
    finally:
        micro_world.loss_of = real
    assert not (broken / "model" / "model.safetensors").exists()
    micro_world.train(TINY, broken, checkpoint_every=3, log_every=3)
    one, two = (load_file(out / "model" / "model.safetensors") for out in (whole, broken))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    curve = json.loads((broken / "curve.json").read_text())
    assert [point["step"] for point in curve] == [3, 6]
    assert sorted(p.name for p in (whole / "points").iterdir()) == ["step_00000.safetensors", "step_00006.safetensors"]
    assert "parameters" in capsys.readouterr().out


def test_another_recipe_s_checkpoint_is_refused(folder, capsys):
    out = folder("other")
    micro_world.train(replace(TINY, steps=3), out, checkpoint_every=3, log_every=3)
    with pytest.raises(SystemExit, match="another recipe"):
        micro_world.train(TINY, out)
    assert capsys.readouterr().out


def test_batches_follow_from_seed_split_and_step():
    tokenizer, world = AutoTokenizer.from_pretrained(EMBEDDED), shipped_world()
    one = micro_world.batch_of(TINY, world, tokenizer, 2)
    assert torch.equal(one, micro_world.batch_of(TINY, world, tokenizer, 2))
    assert not torch.equal(one, micro_world.batch_of(TINY, world, tokenizer, 3))
    assert not torch.equal(one, micro_world.batch_of(TINY, world, tokenizer, 2, split="held-out"))
    assert one.shape == (2, 32)
    assert not torch.equal(one, micro_world.batch_of(replace(TINY, seed=1), world, tokenizer, 2))


def test_items_follow_from_the_seed_and_have_one_token_answers():
    tokenizer, world = AutoTokenizer.from_pretrained(EMBEDDED), shipped_world()
    for name in abilities.ABILITIES:
        items = abilities.items_of(world, name, 20, seed=0)
        assert items == abilities.items_of(world, name, 20, seed=0)
        for item in items:
            for word in (*item.right, *item.wrong):
                ids = tokenizer(item.prompt + word).input_ids
                assert ids[:-1] == tokenizer(item.prompt).input_ids, (item.prompt, word)
