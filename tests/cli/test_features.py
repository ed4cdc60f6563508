"""`tomoscope features train`: dictionaries side by side from the command line, gone on with, and read back."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import save
from tomoscope.cli.main import app
from tomoscope.features import load_coder, load_transcoders


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    save(folder / "model")
    text = "\n\n".join(f"Mary and John went to the store number {i}, and he gave a drink to her." for i in range(200))
    (folder / "corpus.txt").write_text(text)
    return folder


def train(place, out, *options):
    return run(
        "features", "train", place / "model", "--corpus", place / "corpus.txt", "--tokens", 6000, "--batch", 256,
        "--out", out, "--json", *options,
    )  # fmt: skip


@pytest.mark.parametrize("stored", [False, True])
def test_layers_sizes_and_sparsities_side_by_side(place, tmp_path, stored):
    more = ["--store", tmp_path / "store"] if stored else []
    options = ["--site", "layer.*.resid_post", "--latents", "64,128", "--k", "4,8", *more]
    result = train(place, tmp_path / "d", *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["dictionaries"]) == len(told["files"]) == 3 * 2 * 2
    assert all(0 < one["variance_unexplained"] < 1 for one in told["dictionaries"])
    coder = load_coder(told["files"][0])
    assert coder.reads == coder.writes == "layer.0.resid_post"
    assert int((coder.encode(torch.randn(5, 32)) > 0).sum(1).max()) <= 4
    again = train(place, tmp_path / "d", *options)
    assert "Resuming at step 23 of 23" in again.stderr
    other = train(place, tmp_path / "d", *options, "--seed", 3)
    assert other.exit_code == 2


def test_transcoders_and_crosscoders(place, tmp_path):
    sites = ["--site", "layer.*.mlp.in", "--writes", "layer.*.mlp.out", "--latents", 64, "--k", 4]
    single = train(place, tmp_path / "t", *sites)
    assert single.exit_code == 0, single.output
    assert load_coder(json.loads(single.stdout)["files"][1]).writes == "layer.1.mlp.out"
    cross = train(place, tmp_path / "c", *sites, "--cross-layer")
    assert cross.exit_code == 0, cross.output
    assert load_transcoders(json.loads(cross.stdout)["files"][0]).n_layers == 3
    joined = train(place, tmp_path / "j", "--site", "layer.*.resid_post", "--join", "--latents", 64, "--k", 4)
    assert load_coder(json.loads(joined.stdout)["files"][0]).d_in == 96
    plain = train(place, tmp_path / "r", "--site", "layer.0.attn.z", "--latents", 64, "--architecture", "jumprelu",
                  "--target-l0", 5)  # fmt: skip
    assert plain.exit_code == 0, plain.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "No site"),
        (["--site", "layer.0.resid_pots"], "resid_pots"),
        (["--site", "layer.0.attn.pattern"], "no value a token"),
        (["--site", "layer.0.resid_post", "--k", "x"], "no list of numbers"),
        (["--site", "layer.0.resid_post", "--architecture", "topkk"], "topkk"),
        (["--site", "layer.0.resid_post", "--batch", "100000", "--tokens", "100000"], "too few"),
        (["--site", "layer.*.mlp.in", "--writes", "layer.0.mlp.out"], "3 sites are read and 1 written"),
    ],
)
def test_mistakes_are_told_with_code_2(place, tmp_path, options, words):
    result = train(place, tmp_path / "d", *options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_corpus_is_needed(place, tmp_path):
    result = run("features", "train", place / "model", "--site", "layer.0.resid_post", "--out", tmp_path / "d")
    assert result.exit_code == 2
    assert "No corpus" in result.stderr
