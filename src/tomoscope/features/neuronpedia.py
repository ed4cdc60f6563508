"""Features for Neuronpedia: SAEDashboard's `batch-N.json`, and the tree that the site imports.

Everything comes from dashboards already made (`FeatureBook`); no model runs. What they do not hold is left out or
empty, never made up: correlations with neurons and the histogram of all logits. (The site's fields `..._l1` beside
correlations hold cosines, and the one beside the alignment shares of the direction's absolute sum.)

    export_batches(book, tokenizer, folder, model_id="gpt2-small", sae_set="res-jb")
    export_import_tree(book, tokenizer, folder, ..., labels=...)

Formats as read in SAEDashboard 0.8 and the site's repository of 2026-08: values rounded to 5 places; a source is
"{layer}-{set}"; activations carry the bin of the feature's range that they were drawn from.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.features.book import Context, FeatureBook, token_words
from tomoscope.findings.files import write_bytes, write_json

BATCH = 128
Page = tuple[dict[str, Any], list[Context]]


def export_batches(
    book: FeatureBook,
    tokenizer: Any,
    folder: str | Path,
    *,
    model_id: str,
    sae_set: str,
    layer: int | None = None,
    suffix: str | None = None,
) -> list[Path]:
    """Write `batch-N.json`, 128 features each; a file that is there is not written again.

    Args:
        book: the dashboards.
        tokenizer: the model's.
        folder: where to.
        model_id, sae_set: as the site knows them.
        layer: of the site; read from its name where not given.
        suffix: "sae_id_suffix".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    say, written = token_words(tokenizer), []
    for number, pages in enumerate(_batched(book)):
        path = folder / f"batch-{number}.json"
        written.append(path)
        if path.exists():
            continue
        features = [_batch_feature(book, summary, contexts, say) for summary, contexts in pages]
        write_json(
            path,
            {
                "model_id": model_id, "layer": layer if layer is not None else layer_of(book), "sae_set": sae_set,
                "sae_id_suffix": suffix, "features": features,
            },
        )  # fmt: skip
    return written


def _batched(book: FeatureBook) -> Iterator[list[Page]]:
    pages = book.pages()
    while some := list(islice(pages, BATCH)):
        yield some


def layer_of(book: FeatureBook) -> int:
    """The layer that the site's name says, -1 where it says none."""
    parts = str(book.manifest["site"]).split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1


def _batch_feature(book: FeatureBook, summary: Mapping[str, Any], contexts: list[Context], say: Any) -> dict[str, Any]:
    edges = np.linspace(0.0, float(summary["max"]), len(summary["histogram"]) + 1)
    return {
        "feature_index": int(summary["latent"]),
        **_tables(summary),
        "neg_str": [say(token) for token in summary["lowered"]], "neg_values": _rounded(summary["lowered_by"]),
        "pos_str": [say(token) for token in summary["raised"]], "pos_values": _rounded(summary["raised_by"]),
        "frac_nonzero": round(float(summary["density"]), 8),
        "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2),
        "freq_hist_data_bar_heights": [int(count) for count in summary["histogram"]],
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [],
        "n_prompts_total": len(book.store.text[1]), "n_tokens_in_prompt": None, "dataset": None,
        "activations": [
            _batch_activation(context, summary, say, int(book.manifest["options"]["quantiles"]))
            for context in contexts
        ],
    }  # fmt: skip


def _tables(summary: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What the page's tables of alignment and correlation hold."""
    count = sum(index >= 0 for index in summary["correlated"])
    return {
        "neuron_alignment_indices": [int(i) for i in summary["aligned"]],
        "neuron_alignment_values": _rounded(summary["aligned_by"]),
        "neuron_alignment_l1": _rounded(summary["aligned_share"]),
        "correlated_neurons_indices": [], "correlated_neurons_l1": [], "correlated_neurons_pearson": [],
        "correlated_features_indices": [int(i) for i in summary["correlated"][:count]],
        "correlated_features_l1": _rounded(summary["correlated_cosine"][:count]),
        "correlated_features_pearson": _rounded(summary["correlated_pearson"][:count]),
    }  # fmt: skip


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _bin(context: Context, summary: Mapping[str, Any], parts: int) -> tuple[float, float, float]:
    """Ends of the part of the range that a context was drawn from, and the share of activations in it."""
    top, counts = float(summary["max"]), np.asarray(summary["histogram"])
    if context.bin < 0:
        return -1.0, -1.0, -1.0
    low, high = top * context.bin / parts, top * (context.bin + 1) / parts
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    inside = (middles >= context.bin / parts) & (middles < (context.bin + 1) / parts)
    return low, high, float(counts[inside].sum() / max(1, counts.sum()))


def _batch_activation(context: Context, summary: Mapping[str, Any], say: Any, parts: int) -> dict[str, Any]:
    low, high, share = _bin(context, summary, parts)
    return {
        "bin_min": round(low, 5), "bin_max": round(high, 5), "bin_contains": round(share, 5),
        "qualifying_token_index": context.peak, "tokens": [say(token) for token in context.tokens.tolist()],
        "values": _rounded(context.values),
    }  # fmt: skip


def export_import_tree(
    book: FeatureBook,
    tokenizer: Any,
    folder: str | Path,
    *,
    model_id: str,
    sae_set: str,
    release: str,
    creator: str = "",
    labels: Mapping[int, tuple[str, float | None]] | None = None,
    explainer: str = "",
) -> Path:
    """Write the tree that the site imports: release, model, source set and source, and features, activations and
    explanations in batches of gzipped JSON lines.

    Args:
        book: the dashboards.
        tokenizer: the model's.
        folder: where to.
        model_id, sae_set: as the site knows them.
        release: the release's name.
        creator: of the source.
        labels: feature -> (label, score).
        explainer: what made the labels.
    """
    folder, say = Path(folder), token_words(tokenizer)
    source = f"{layer_of(book)}-{sae_set}"
    for part in ("features", "activations", "explanations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    parts = int(book.manifest["options"]["quantiles"])
    head = {
        "release": {"name": release, "description": "", "creatorName": creator, "isNewUi": True},
        "model": {"id": model_id, "displayName": model_id, "owner": creator},
        "sourceset": {"modelId": model_id, "name": sae_set, "releaseName": release, "type": "SAE",
                      "creatorName": creator, "description": ""},
        "source": {"modelId": model_id, "id": source, "setName": sae_set, "hookPoint": book.manifest["site"],
                   "num_prompts": len(book.store.text[1])},
    }  # fmt: skip
    for name, row in head.items():
        _write_lines(folder / f"{name}.jsonl", [row])
    for number, pages in enumerate(_batched(book)):
        rows: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
        for summary, contexts in pages:
            latent = int(summary["latent"])
            rows["features"].append(_feature_row(summary, say, model_id, source))
            rows["activations"] += list(_activation_rows(summary, contexts, say, model_id, source, parts))
            if labels and latent in labels:
                text, score = labels[latent]
                rows["explanations"].append(
                    {
                        "id": _id(model_id, source, latent, "explanation"), "modelId": model_id, "layer": source,
                        "index": str(latent), "description": text, "typeName": explainer or None,
                        "explanationModelName": explainer or None, "score": score,
                    }
                )  # fmt: skip
        for name, some in rows.items():
            if some:
                _write_lines(folder / name / f"batch-{number}.jsonl.gz", some, zipped=True)
    return folder


def _feature_row(summary: Mapping[str, Any], say: Any, model_id: str, source: str) -> dict[str, Any]:
    edges = np.linspace(0.0, float(summary["max"]), len(summary["histogram"]) + 1)
    return {
        "modelId": model_id, "layer": source, "index": str(summary["latent"]),
        "maxActApprox": round(float(summary["max"]), 5), "hasVector": False,
        **_tables(summary),
        "topkCosSimIndices": [int(i) for i in summary["near"]], "topkCosSimValues": _rounded(summary["near_cosine"]),
        "pos_str": [say(token) for token in summary["raised"]], "pos_values": _rounded(summary["raised_by"]),
        "neg_str": [say(token) for token in summary["lowered"]], "neg_values": _rounded(summary["lowered_by"]),
        "frac_nonzero": round(float(summary["density"]), 8),
        "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2),
        "freq_hist_data_bar_heights": [int(count) for count in summary["histogram"]],
    }  # fmt: skip


def _activation_rows(
    summary: Mapping[str, Any], contexts: list[Context], say: Any, model_id: str, source: str, parts: int
) -> Iterator[dict[str, Any]]:
    latent = int(summary["latent"])
    for number, context in enumerate(contexts):
        low, high, share = _bin(context, summary, parts)
        values = _rounded(context.values)
        best = int(np.argmax(context.values))
        yield {
            "id": _id(model_id, source, latent, number), "modelId": model_id, "layer": source, "index": str(latent),
            "tokens": [say(token) for token in context.tokens.tolist()], "values": values,
            "maxValue": values[best], "maxValueTokenIndex": best, "minValue": min(values), "dfaValues": [],
            "binMin": round(low, 5), "binMax": round(high, 5), "binContains": round(share, 5),
            "qualifyingTokenIndex": context.peak,
        }  # fmt: skip


def _id(*parts: object) -> str:
    """An id of the site's form (c and 24 letters or digits) that follows from what it names."""
    return "c" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _write_lines(path: Path, rows: list[dict[str, Any]], *, zipped: bool = False) -> None:
    data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii")
    write_bytes(path, gzip.compress(data, mtime=0) if zipped else data)
