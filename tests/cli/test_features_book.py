"""`tomoscope features` and `tomoscope plan` from the shell: from a dictionary's file to a feature's page."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.features.parts import embedded, texts, trained_coder
from tomoscope.cli import common
from tomoscope.cli.main import app
from tomoscope.features import FeatureBook, export_coder

SITE = "layer.3.resid_post"


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    monkeypatch.setattr(common, "open_subject", lambda source, **options: embedded())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    return export_coder(trained_coder(), tmp_path_factory.mktemp("dictionary"), "sparsify")


@pytest.fixture(scope="module")
def folder(dictionary, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "open_subject", lambda source, **options: embedded())
        made = run(
            "features", "dashboards", "--coder", dictionary, "--site", SITE, "--rows", 60, "--length", 32, "-o", out
        )
    assert made.exit_code == 0, made.output
    assert "256 features" in made.stdout
    return out


def test_measure_beside_what_is_dumb(dictionary, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts(60)))
    result = run(
        "features",
        "measure",
        "--coder",
        dictionary,
        "--site",
        SITE,
        "--rows",
        12,
        "--length",
        32,
        "--corpus",
        text,
        "--json",
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"dictionary", "random", "pca", "neurons", "baselines_missing"}
    own, chance = (document[name]["measures"]["explained_variance"]["value"] for name in ("dictionary", "random"))
    assert own > chance
    table = run(
        "features", "measure", "--coder", dictionary, "--site", SITE, "--rows", 4, "--length", 16, "--no-baselines"
    )
    assert table.exit_code == 0, table.output
    assert "explained variance" in table.stdout


def test_label_search_show_and_export(folder, dictionary, tmp_path):
    counts = FeatureBook.open(folder).column("fires")
    latent = int((-counts).argsort()[30])
    result = run("features", "label", folder, "--latents", f"{latent}", "--contexts", 20, "--shuffles", 1, "--json")
    assert result.exit_code == 0, result.output
    (label,) = json.loads(result.stdout)
    assert label["latent"] == latent
    assert label["label"] or label["why_not"]
    shown = run("features", "show", folder, latent, "--html", tmp_path / "page.html")
    assert shown.exit_code == 0, shown.output
    assert f"Feature {latent}" in shown.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    found = run("features", "search", folder, "--text", texts(3)[1], "--coder", dictionary, "--json", "--limit", 3)
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)) == 3
    raising = run("features", "search", folder, "--token", " Paris", "--json")
    assert raising.exit_code == 0, raising.output
    words = run("features", "search", folder, "zebra")
    assert words.stdout.strip() == "no feature"
    out = run("features", "export", folder, "--out", tmp_path / "site", "--model-id", "micro", "--json")
    assert out.exit_code == 0, out.output
    assert (tmp_path / "site" / "features" / "batch-1.jsonl.gz").exists()


def test_a_plan_for_labels_asks_nobody(folder):
    result = run(
        "features", "label", folder, "--explainer", "http://127.0.0.1:9/v1", "--plan", "--price", "1", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cost"] > 0


def test_import_writes_another_format(dictionary, tmp_path):
    result = run("features", "import", dictionary, "--out", tmp_path / "other", "--to", "dictionary_learning", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["features"] == 256
    assert (tmp_path / "other" / "ae.pt").exists()


def test_the_plan_is_told_with_its_formulas():
    sizes = ("--model-params", "70e9", "--d-model", "8192", "--latents", "30e6", "--tokens", "8e9")
    result = run("plan", "features", *sizes)
    assert result.exit_code == 0, result.output
    assert "ZFLOP" in result.stdout
    document = json.loads(run("plan", "features", *sizes, "--hardware", "H200", "--json").stdout)
    assert document["given"]["hardware"] == "H200"
    assert {line["group"] for line in document["lines"]} == {"work", "disk", "memory", "time", "money"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("features", "measure", "--coder", "nowhere"), "nowhere"),
        (("features", "show", "nowhere", "3"), "no finished dashboards"),
        (("features", "search", "nowhere", "x"), "no index"),
        (("features", "search", "nowhere"), "one of"),
        (("features", "import", "nowhere", "--out", "x"), "nowhere"),
        (("plan", "features", "--model-params", "0", "--d-model", "8", "--latents", "64", "--tokens", "9"), "above 0"),
    ],
)
def test_mistakes_are_told_in_words(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_latents_are_named_by_ranges(folder):
    from tomoscope.cli.features_book import chosen_latents
    from tomoscope.errors import DataError

    book = FeatureBook.open(folder)
    assert chosen_latents(book, "3-5, 9", 0) == [3, 4, 5, 9]
    assert len(chosen_latents(book, "", 7)) == 7
    for wrong in ("x", "1-y", "256"):
        with pytest.raises(DataError):
            chosen_latents(book, wrong, 0)
