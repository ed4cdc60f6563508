"""`treat`, `export` and `undo` on a model's directory: a head taken out, made part of the model, and put back."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import FAMILIES, save
from tomoscope.cli.main import app
from tomoscope.concepts import Direction
from tomoscope.exams.concept_run import save_direction
from tomoscope.model import open_model
from tomoscope.treat import load_treatment

IDS = torch.tensor([[5, 9, 17, 33, 8]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_taken_out_exported_and_put_back(family, folders, tmp_path):
    model = folders[family]
    made = run("treat", model, "--remove-head", "1.2", "-o", tmp_path / "head.safetensors")
    assert made.exit_code == 0, made.stderr
    other = run("treat", model, "--remove-neuron", "0.3", "--remove-neuron", "0.4", "-o", tmp_path / "two.safetensors")
    assert other.exit_code == 0, other.stderr
    assert load_treatment(tmp_path / "head.safetensors").origin.requests == ({"layer": 1, "head": 2},)
    files = ["-t", tmp_path / "head.safetensors", "-t", tmp_path / "two.safetensors"]
    out = run("export", model, *files, "-o", tmp_path / "treated")
    assert out.exit_code == 0, out.stderr
    treated, plain = open_model(tmp_path / "treated"), open_model(model)
    for path in files[1::2]:
        load_treatment(path).apply(plain)
    torch.testing.assert_close(treated.last_logits(IDS), plain.last_logits(IDS), rtol=0, atol=0)
    again = run("export", model, *files, "-o", tmp_path / "treated")
    assert again.exit_code == 2
    assert "there already" in again.stderr
    back = run("undo", tmp_path / "treated", "-o", tmp_path / "back")
    assert back.exit_code == 0, back.stderr
    first, last = open_model(model).model.state_dict(), open_model(tmp_path / "back").model.state_dict()
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_direction_is_taken_out_and_put_back_where_embeddings_are_tied(folders, tmp_path):
    model = folders["gpt2"]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction = Direction("any", "layer.1.resid_post", vector, method="means")
    folder = tmp_path / "direction"
    folder.mkdir()
    path = save_direction(direction, folder)
    made = run("treat", model, "--remove-direction", path, "-o", tmp_path / "gone.safetensors")
    assert made.exit_code == 0, made.stderr
    assert run("export", model, "-t", tmp_path / "gone.safetensors", "-o", tmp_path / "treated").exit_code == 0
    acts = open_model(tmp_path / "treated").read(IDS, "layer.2.resid_post")["layer.2.resid_post"]
    assert float((acts @ vector).abs().max()) < 1e-4 * float(acts.norm()) * float(vector.norm())
    back = run("undo", tmp_path / "treated", "-o", tmp_path / "back")
    assert back.exit_code == 0, back.stderr
    before, after = open_model(model), open_model(tmp_path / "back")
    torch.testing.assert_close(after.last_logits(IDS), before.last_logits(IDS), rtol=0, atol=0)
    assert after.model.get_input_embeddings().weight is after.model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Nothing to remove"),
        (["--remove-head", "1"], "no place"),
        (["--remove-head", "1.99"], "no head 99"),
        (["--remove-head", "1.0", "--remove-neuron", "0.1"], "heads and neurons"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(arguments, said, folders, tmp_path):
    out = run("treat", folders["gpt2"], *arguments, "-o", tmp_path / "x.safetensors")
    assert out.exit_code == 2
    assert said in out.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_only_exported_models_are_undone(folders, tmp_path):
    out = run("undo", folders["gpt2"], "-o", tmp_path / "back")
    assert out.exit_code == 2
    assert "before.safetensors" in out.stderr
