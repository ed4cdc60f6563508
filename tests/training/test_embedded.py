from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data import TASKS
from training import embedded, evaluate, probes, text

FOLDER = Path(str(files("tomoscope.model") / "embedded"))
TINY = embedded.Recipe(
    steps=6, rows=2, context=32, layers=1, d_model=16, heads=2, d_mlp=16, warm_up=2, random_until=4, autocast=False
)


@pytest.fixture(scope="module")
def shipped():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), tokenizer


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((FOLDER / "card.json").read_text())


@pytest.fixture
def prepared(tmp_path: Path, shipped) -> Path:
    for name in ("one", "two"):
        shipped[1].save_pretrained(tmp_path / name / "model")
    return tmp_path


def test_training_that_was_stopped_goes_on_as_if_it_had_not(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "measure", lambda *_: {})
    torch.set_num_threads(1)
    embedded.train(TINY, prepared / "one", checkpoint_every=3, log_every=3)
    real, calls = embedded.batch_of, []

    def stop_at_four(recipe, tokenizer, step, **options):
        calls.append(step)
        if step == 4 and calls.count(4) == 1:
            raise KeyboardInterrupt
        return real(recipe, tokenizer, step, **options)

    monkeypatch.setattr(embedded, "batch_of", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        embedded.train(TINY, prepared / "two", checkpoint_every=3, log_every=3)
    embedded.train(TINY, prepared / "two", checkpoint_every=3, log_every=3)
    assert calls == [0, 1, 2, 3, 4, 3, 4, 5]
    one, two = (load_file(prepared / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [point["step"] for point in json.loads((prepared / "two" / "curve.json").read_text())] == [3, 6]
    with pytest.raises(SystemExit, match="another recipe"):
        embedded.train(replace(TINY, seed=1), prepared / "two")
    assert "parameters" in capsys.readouterr().out


def test_batches_are_a_function_of_seed_and_step(shipped) -> None:
    tokenizer = shipped[1]
    recipe = embedded.Recipe()
    one = embedded.batch_of(recipe, tokenizer, 5)
    assert one.shape == (recipe.rows, recipe.context)
    assert torch.equal(one, embedded.batch_of(recipe, tokenizer, 5))
    assert not torch.equal(one, embedded.batch_of(recipe, tokenizer, 6))
    assert not torch.equal(one, embedded.batch_of(replace(recipe, seed=1), tokenizer, 5))
    assert not torch.equal(one, embedded.batch_of(recipe, tokenizer, 5, split="held-out"))


def test_random_rows_repeat() -> None:
    for i in range(50):
        row = embedded.random_row(Random(i), 1_000, 64)
        assert len(row) == 64
        assert any(row[-16:] == row[-16 - period : -period] for period in range(2, 33))


def test_schedules() -> None:
    recipe = embedded.Recipe()
    rates = [embedded.rate(recipe, step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[-1] == pytest.approx(0.01 * recipe.learning_rate, rel=0.05)
    assert embedded.random_share(recipe, 0) == recipe.random_rows_first
    assert embedded.random_share(recipe, recipe.random_until) == pytest.approx(recipe.random_rows)


def test_wilson_intervals() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert evaluate.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_what_ships_is_whole_and_small(shipped, card: dict) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(evaluate.SHIPPED)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20
    model, tokenizer = shipped
    assert card["license"] == "Apache-2.0"
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["vocabulary"] == len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.is_fast
    assert tokenizer("When Mary went").input_ids == tokenizer("When Mary went", add_special_tokens=False).input_ids


def test_every_word_of_the_tasks_is_one_token(shipped) -> None:
    for word in text.vocabulary():
        assert len(shipped[1](f" {word}").input_ids) == 1


@pytest.mark.parametrize("words", ["When Mary and John went", "été 🎉 x\n\n  y", "The war of 1732 {a}: <b>"])
def test_the_tokenizer_loses_nothing(shipped, words: str) -> None:
    assert shipped[1].decode(shipped[1](words).input_ids) == words


def test_the_loss_is_far_below_counting(shipped, card: dict) -> None:
    model, tokenizer = shipped
    rows = torch.tensor(embedded.pack(Random("a test"), tokenizer, 24, 128))
    with torch.no_grad():
        loss = float(embedded.loss_of(model, rows))
    stated = card["losses"]
    assert loss == pytest.approx(stated["held_out_text"]["value"], abs=0.15)
    assert loss < stated["counting_on_the_same_text"]["bigram"] < stated["counting_on_the_same_text"]["unigram"] - 1


def test_the_card_states_what_the_model_does(shipped, card: dict) -> None:
    model, tokenizer = shipped
    for name, stated in card["probes_on_held_out"].items():
        counts = probes.score(model, probes.items_of(tokenizer, name, 60, seed=3))
        low, high = evaluate.wilson(int(counts["preferred"]), 60)
        assert low - 0.02 <= stated["preferred"]["high"]
        assert high + 0.02 >= stated["preferred"]["low"]


@pytest.mark.parametrize("name", list(TASKS))
def test_the_tasks_of_the_library_are_done(shipped, card: dict, name: str) -> None:
    model, tokenizer = shipped
    found = evaluate.on_pairs(model, tokenizer, TASKS[name].make(tokenizer, 60, seed=9))
    assert found["preferred"]["high"] >= card["tasks_of_the_library"][name]["preferred"]["low"]
