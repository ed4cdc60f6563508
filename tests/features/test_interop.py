"""Every format there and back, against the formula that its own library runs, written out."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.features.parts import coder, embedded, normal, texts, trained_coder
from tomoscope.errors import DataError, ModelNotFoundError
from tomoscope.features import (
    DashboardOptions,
    FeatureBook,
    JumpReLU,
    ReLU,
    SparseCoder,
    TopK,
    export_batches,
    export_coder,
    export_import_tree,
    harvest_codes,
    import_coder,
    make_dashboards,
    recentred,
)
from tomoscope.features.dashboard import rows_of

D, F = 6, 10
LEVELS = normal(F, seed=4).abs()
KINDS = {
    "relu": ReLU(), "topk": TopK(3), "jump": JumpReLU(LEVELS), "level": JumpReLU(torch.full((F,), 0.3)),
}  # fmt: skip


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("kind", ["dictionary_learning", "sparsify", "gemma_scope"])
def test_there_and_back(kind, name, centred, tmp_path):
    one, x = coder(activation=KINDS[name], centred=centred), normal(40, D, seed=7)
    fits = {"sparsify": name == "topk", "gemma_scope": name != "topk", "dictionary_learning": True}[kind]
    if not fits:
        with pytest.raises(DataError, match="files hold"):
            export_coder(one, tmp_path, kind)
        return
    folder = export_coder(one, tmp_path / "trainer_0", kind)
    again = import_coder(folder / "params.npz" if kind == "gemma_scope" else folder)
    torch.testing.assert_close(again.encode(x), one.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again(x), one(x), atol=1e-5, rtol=1e-5)


def test_a_skip_transcoder_in_sparsify(tmp_path):
    one = coder(activation=TopK(3), W_skip=normal(D, D), reads="layer.0.mlp.in", writes="layer.0.mlp.out")
    again = import_coder(export_coder(one, tmp_path, "sparsify"))
    x = normal(20, D)
    torch.testing.assert_close(again(x), one(x), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "cfg.json").read_text())["transcode"] is True
    for kind in ("gemma_scope", "dictionary_learning"):
        with pytest.raises(DataError, match="skip"):
            export_coder(one, tmp_path, kind)


def test_recentred_is_the_same_function():
    one, x = coder(centred=True), normal(30, D)
    moved = recentred(one, False)
    assert not moved.centred
    torch.testing.assert_close(moved(x), one(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(recentred(moved, True).b_enc, one.b_enc, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="another"):
        recentred(SparseCoder(normal(D, F), normal(F, 4), normal(F), normal(4)), True)


def save(folder, parts, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parts, folder / "ae.pt")
    if trainer:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


@pytest.mark.parametrize("told", [True, False])
def test_dictionary_learnings_own_formulas(tmp_path, told):
    """Each class as its library computes it, with its own layers; told by the config or by what is stored."""
    x = normal(50, D, seed=9)
    encoder, decoder = nn.Linear(D, F), nn.Linear(F, D, bias=False)
    shared = {"encoder.weight": encoder.weight.data, "decoder.weight": decoder.weight.data}
    bias, b_enc = normal(D, seed=2), encoder.bias.data
    level, r_mag, b_gate, b_mag = normal(F).abs(), 0.3 * normal(F, seed=1), normal(F, seed=3), normal(F, seed=5)
    with torch.no_grad():
        gate = (x - bias) @ encoder.weight.T + b_gate > 0
        magnitude = torch.relu((x - bias) @ encoder.weight.T * r_mag.exp() + b_mag)
        relu = torch.relu(encoder(x - bias))
        best = relu.topk(3, dim=-1)
        topk = torch.zeros_like(relu).scatter(-1, best.indices, best.values)
        pre = x @ encoder.weight.T + b_enc
        cases = {
            "AutoEncoder": (shared | {"encoder.bias": b_enc, "bias": bias}, decoder(relu) + bias),
            "GatedAutoEncoder": (
                shared | {"decoder_bias": bias, "gate_bias": b_gate, "mag_bias": b_mag, "r_mag": r_mag},
                decoder(gate * magnitude) + bias,
            ),
            "JumpReluAutoEncoder": (
                {"W_enc": encoder.weight.data.T.contiguous(), "W_dec": decoder.weight.data.T.contiguous(),
                 "b_enc": b_enc, "b_dec": bias, "threshold": level},
                decoder(torch.relu(pre * (pre > level))) + bias,
            ),
            "AutoEncoderTopK": (
                shared | {"encoder.bias": b_enc, "b_dec": bias, "k": torch.tensor(3), "threshold": torch.tensor(-1.0)},
                decoder(topk) + bias,
            ),
            "BatchTopKSAE": (
                shared | {"encoder.bias": b_enc, "b_dec": bias, "k": torch.tensor(3), "threshold": torch.tensor(0.4)},
                decoder(relu * (relu > 0.4)) + bias,
            ),
            "MatryoshkaBatchTopKSAE": (
                {"W_enc": encoder.weight.data.T.contiguous(), "W_dec": decoder.weight.data.T.contiguous(),
                 "b_enc": b_enc, "b_dec": bias, "k": torch.tensor(3), "threshold": torch.tensor(0.4),
                 "group_sizes": torch.tensor([4, 6])},
                decoder(relu * (relu > 0.4)) + bias,
            ),
        }  # fmt: skip
    for name, (parts, expected) in cases.items():
        folder = save(tmp_path / f"{name}{told}", parts, **({"dict_class": name} if told else {}))
        torch.testing.assert_close(import_coder(folder)(x), expected, atol=1e-5, rtol=1e-5, msg=name)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ModelNotFoundError):
        import_coder(tmp_path / "ae.pt")
    with pytest.raises(DataError, match="not known"):
        import_coder(save(tmp_path / "a", {"x": torch.zeros(1)}, dict_class="Crosscoder"))
    with pytest.raises(DataError, match="holds no"):
        import_coder(save(tmp_path / "b", {"x": torch.zeros(1)}, dict_class="AutoEncoder"))
    parts = {"k": torch.tensor(3), "threshold": torch.tensor(-1.0), "W_enc": normal(D, F), "b_enc": normal(F)}
    with pytest.raises(DataError, match="never set"):
        import_coder(save(tmp_path / "c", parts))
    with pytest.raises(DataError, match="can't be read|more than weights"):
        import_coder(save(tmp_path / "d", {"x": slice(1)}))
    with pytest.raises(DataError, match="sparsify"):
        export_coder(coder(), tmp_path, "sparsfy")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder, one = tmp_path_factory.mktemp("pedia"), trained_coder()
    store = harvest_codes(embedded(), one, rows_of(list(texts(6)), embedded(), length=32), folder / "codes")
    options = DashboardOptions(top=3, per_quantile=1)
    return FeatureBook.open(make_dashboards(embedded(), one, store, folder / "book", options=options))


def test_batches_hold_what_the_dashboards_hold(book, tmp_path):
    tokenizer = embedded().tokenizer
    paths = export_batches(book, tokenizer, tmp_path, model_id="micro", sae_set="res")
    assert [path.name for path in paths] == ["batch-0.json", "batch-1.json"]
    batch = json.loads(paths[0].read_text())
    assert batch["layer"] == 3
    assert len(batch["features"]) == 128
    latent = int(np.argmax(book.column("fires")[:128]))
    one, summary = batch["features"][latent], book.summary(latent)
    assert one["feature_index"] == latent
    assert sum(one["freq_hist_data_bar_heights"]) == summary["fires"]
    assert one["pos_str"] == [tokenizer.decode([token]) for token in summary["raised"]]
    context = book.contexts(latent)[0]
    assert one["activations"][0]["values"] == [round(float(value), 5) for value in context.values]
    assert one["activations"][0]["tokens"][context.peak] == tokenizer.decode([int(context.tokens[context.peak])])
    shares = {a["bin_min"]: a["bin_contains"] for a in one["activations"] if a["bin_min"] >= 0}
    assert sum(shares.values()) <= 1 + 1e-6


def test_the_import_tree(book, tmp_path):
    latent = int(np.argmax(book.column("fires")))
    export_import_tree(
        book, embedded().tokenizer, tmp_path, model_id="micro", sae_set="res", release="first",
        labels={latent: ("a label", 0.9)}, explainer="rules",
    )  # fmt: skip
    assert json.loads((tmp_path / "source.jsonl").read_text())["id"] == "3-res"
    lines = lambda name: [  # noqa: E731
        json.loads(line)
        for path in sorted((tmp_path / name).glob("*.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert {row["index"] for row in lines("features")} == {str(i) for i in range(256)}
    (label,) = lines("explanations")
    assert (label["index"], label["description"]) == (str(latent), "a label")
    rows = [row for row in lines("activations") if row["index"] == str(latent)]
    assert len(rows) == len(book.contexts(latent))
    assert all(row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"]) for row in rows)
    ids = [row["id"] for row in lines("activations")]
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 25 for one in ids)
