"""Dashboards of all features from one pass over a corpus: what each fires on, and what it does.

    store = harvest_codes(subject, coder, rows, "codes")
    book = make_dashboards(subject, coder, store, "features")
    book.card(17)

Of each feature: how often and how strongly it fires, a histogram of its activations, the texts on which it is strongest
and a sample from each fifth of its range (top contexts alone make features look cleaner than they are), the tokens it
fires on with their entropy and the share of the commonest one (a feature of a single token is no concept), where in the
corpus it fires, features that fire on the same tokens (Jaccard) and those whose codes correlate with its own, the
nearest decoder directions, the dimensions that its direction has most of, the tokens whose logits it raises and lowers,
and its place on a map (first two principal components of the decoder directions).

Features are handled in blocks of bounded size, vectorised inside; each block is one Parquet part, written whole, and a
killed run goes on with the next block. Memory holds one block of codes, the decoder, and the token ids (4 bytes
a token); nearest directions compare all pairs, a block of both at a time, which is most of the work beyond about a
million features.

How it can mislead: logit effects are the direct path alone: the derivative of the logits along the decoder direction at
the corpus's mean final stream, less its mean over the vocabulary; later layers may do something else with the feature.
Co-firing and correlations are counted on the first tokens of the corpus (`cofire_tokens`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.codes import CodeStore, Entries, dictionary_digest
from tomoscope.features.grouped import best_of_rows, bin_of, histograms, maxima, rank_within, token_counts
from tomoscope.features.stability import unit
from tomoscope.findings.files import write_bytes, write_json
from tomoscope.model import Subject

PIECE = 2**25
SIDE = 2048
"""Directions that are compared with a block of others at a time."""
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class DashboardOptions:
    """How much is kept of each feature.

    Attributes:
        top: strongest texts.
        quantiles: parts of the range of activations.
        per_quantile: texts drawn from each part.
        bins: of the histogram.
        tokens: logits and firing tokens listed.
        near: decoder directions and co-firing features listed.
        segments: parts of the corpus in which firing is counted.
        cofire_tokens: tokens on which co-firing is counted.
        block: codes held at once, about.
        seed: of the drawn texts.
    """

    top: int = 20
    quantiles: int = 5
    per_quantile: int = 5
    bins: int = 32
    tokens: int = 10
    near: int = 5
    segments: int = 32
    cofire_tokens: int = 32_768
    block: int = 4_000_000
    seed: int = 0


def make_dashboards(
    subject: Subject | None,
    coder: SparseCoder,
    store: CodeStore,
    folder: str | Path,
    *,
    options: DashboardOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Summarise every feature; see the module.

    Args:
        subject: the model, for logit effects; None leaves them out.
        coder: the dictionary whose codes the store holds.
        store: from `harvest_codes`.
        folder: where to: `features-*.parquet`, `contexts-*.parquet`, `manifest.json`.
        options: how much is kept.
        progress: called with (features done, what).

    Returns:
        The folder, for `FeatureBook.open`.

    Raises:
        DataError: the store holds codes of another dictionary.
    """
    folder, options = Path(folder), options or DashboardOptions()
    digest = dictionary_digest(coder)
    if store.manifest["digest"] != digest:
        raise DataError("The codes are of another dictionary.", remedy="Harvest this one's.")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"format": 2, "digest": digest, "tokens": store.n_tokens, "options": vars(options)}
    _same(folder / "identity.json", identity)
    ids, rows = store.text
    active = _active(store, options.cofire_tokens)
    fires = (active != 0).astype(np.float32)
    places = plane(coder)
    ends = logit_effects(subject, coder) if subject is not None else None
    directions = unit(coder.W_dec)
    parts = []
    for first, end in store.blocks(options.block):
        name = f"{first:010d}"
        parts.append(name)
        if not (folder / f"features-{name}.parquet").exists():
            entries = store.entries(first, end)
            summary, contexts = _block(entries, first, end, ids, rows, options)
            summary |= _cofire(fires, first, end, options.near)
            summary |= _correlated(active, first, end, options.near)
            summary |= _aligned(coder.W_dec[first:end].float(), options.near)
            summary |= _nearest(directions, first, end, options.near)
            summary |= _logits(ends, coder, first, end, options.tokens)
            summary |= {
                "decoder_norm": coder.W_dec[first:end].float().norm(dim=-1).numpy(),
                "map_x": places[first:end, 0].numpy(), "map_y": places[first:end, 1].numpy(),
            }  # fmt: skip
            write_bytes(folder / f"contexts-{name}.parquet", _parquet(contexts))
            write_bytes(folder / f"features-{name}.parquet", _parquet(summary))
        if progress:
            progress(end, "features")
    manifest = identity | {
        "parts": parts, "codes": str(store.folder.resolve()), "n_features": coder.n_features,
        "site": store.manifest["site"], "model": store.manifest["model"], "dictionary": coder.name,
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return folder


def _same(path: Path, identity: dict[str, Any]) -> None:
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(identity)):
        raise DataError(
            f"{path.parent} holds dashboards of another dictionary, text or options.", remedy="Give another folder."
        )
    write_json(path, identity)


def _block(
    entries: Entries, first: int, end: int, ids: np.ndarray, rows: np.ndarray, options: DashboardOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    n, group = end - first, entries.latent - first
    value, place = entries.value.astype(float), entries.place
    fires = np.bincount(group, minlength=n)
    top = maxima(group, value, n)
    entropy, single, tokens, numbers = token_counts(group, ids[place].astype(np.int64), n, options.tokens)
    segment = np.minimum(place * options.segments // max(1, len(ids)), options.segments - 1)
    spread = np.bincount(group * options.segments + segment, minlength=n * options.segments)
    summary = {
        "latent": np.arange(first, end), "fires": fires, "density": fires / len(ids), "max": top,
        "mean": np.bincount(group, weights=value, minlength=n) / np.maximum(fires, 1),
        "histogram": histograms(group, value, top, options.bins), "token_entropy": entropy, "single_token": single,
        "tokens": tokens, "token_counts": numbers, "segments": spread.reshape(n, options.segments),
    }  # fmt: skip
    row = np.searchsorted(rows, place, side="right") - 1
    kept = best_of_rows(group, row, value)
    return summary, _contexts(group[kept], place[kept], row[kept], value[kept], top, first, options)


def _contexts(
    group: np.ndarray,
    place: np.ndarray,
    row: np.ndarray,
    value: np.ndarray,
    top: np.ndarray,
    first: int,
    options: DashboardOptions,
) -> dict[str, np.ndarray]:
    """The strongest texts (bin -1), and some drawn from each part of the range (0: the weakest)."""
    strongest = np.lexsort((place, -value, group))
    rank = rank_within(group[strongest])
    chosen = strongest[rank < options.top]
    ranks, bins = [rank[rank < options.top]], [np.full(len(chosen), -1)]
    part = bin_of(group, value, top, options.quantiles)
    # a draw that depends on the feature and the place alone, whatever the block
    draw = np.random.default_rng(options.seed).integers(1, 2**61)
    key = ((group + first) * np.int64(0x9E3779B1) ^ place * np.int64(0x85EBCA77) ^ draw) * np.int64(0x27D4EB2F)
    order = np.lexsort((key, part, group))
    rank = rank_within(group[order] * options.quantiles + part[order])
    taken = rank < options.per_quantile
    picked = np.concatenate([chosen, order[taken]])
    ranks.append(rank[taken])
    bins.append(part[order[taken]])
    back = np.lexsort((np.concatenate(ranks), np.concatenate(bins), group[picked]))
    return {
        "latent": (group[picked] + first)[back], "bin": np.concatenate(bins)[back], "rank": np.concatenate(ranks)[back],
        "place": place[picked][back], "row": row[picked][back], "value": value[picked][back],
    }  # fmt: skip


def _active(store: CodeStore, tokens: int) -> Any:
    """Codes on the first tokens: [token, feature], sparse."""
    from scipy.sparse import csc_matrix

    shards = [i for i, start in enumerate(store.starts) if start < tokens]
    entries = store.entries(0, store.n_features, shards=shards)
    keep = entries.place < tokens
    shape = (min(tokens, store.n_tokens), store.n_features)
    where = (entries.place[keep], entries.latent[keep])
    return csc_matrix((entries.value[keep].astype(np.float32), where), shape=shape)


def _cofire(active: Any, first: int, end: int, near: int) -> dict[str, np.ndarray]:
    """The features that fire on the most of the same tokens, by Jaccard's share."""
    n = end - first
    together = (active[:, first:end].T @ active).tocoo()
    counts = np.asarray(active.sum(0)).ravel()
    one, other, both = together.row, together.col, together.data
    keep = other != one + first
    one, other, both = one[keep], other[keep], both[keep]
    jaccard = both / (counts[one + first] + counts[other] - both)
    order = np.lexsort((other, -jaccard, one))
    rank = rank_within(one[order])
    good = rank < near
    which, score = np.full((n, near), -1), np.zeros((n, near), dtype=np.float32)
    which[one[order][good], rank[good]] = other[order][good]
    score[one[order][good], rank[good]] = jaccard[order][good]
    return {"cofire": which, "cofire_jaccard": score}


def _correlated(codes: Any, first: int, end: int, near: int) -> dict[str, np.ndarray]:
    """The features with the largest Pearson correlation among those that fire together, and their cosines."""
    n, tokens = end - first, codes.shape[0]
    products = (codes[:, first:end].T @ codes).tocoo()
    total = np.asarray(codes.sum(0, dtype=np.float64)).ravel()
    squares = np.asarray(codes.multiply(codes).sum(0, dtype=np.float64)).ravel()
    keep = products.col != products.row + first
    one, other, both = products.row[keep], products.col[keep], products.data[keep].astype(np.float64)
    spread = np.sqrt(np.maximum(squares - total**2 / tokens, 0))
    apart = spread[one + first] * spread[other]
    pearson = (both - total[one + first] * total[other] / tokens) / np.where(apart > 0, apart, np.inf)
    cosine = both / np.sqrt(squares[one + first] * squares[other])
    order = np.lexsort((other, -pearson, one))
    rank = rank_within(one[order])
    good, place = order[rank < near], rank[rank < near]
    out = {
        "correlated": np.full((n, near), -1), "correlated_pearson": np.zeros((n, near), dtype=np.float32),
        "correlated_cosine": np.zeros((n, near), dtype=np.float32),
    }  # fmt: skip
    for name, values in zip(out, (other, pearson, cosine), strict=True):
        out[name][one[good], place] = values[good]
    return out


def _aligned(rows: Float[Tensor, "row d"], near: int) -> dict[str, np.ndarray]:
    """The dimensions that a direction has most of, what it has of them, and their shares of its absolute sum."""
    which = rows.abs().topk(min(near, rows.shape[1]), dim=-1).indices
    value = rows.gather(1, which)
    share = value.abs() / rows.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    return {"aligned": which.numpy(), "aligned_by": value.numpy(), "aligned_share": share.numpy()}


def _nearest(directions: Float[Tensor, "feature d"], first: int, end: int, near: int) -> dict[str, np.ndarray]:
    near = min(near, len(directions) - 1)
    if near < 1:
        nothing = np.zeros((end - first, 0))
        return {"near": nothing.astype(np.int64), "near_cosine": nothing}
    values, places = [], []
    for some in torch.arange(first, end).split(SIDE):
        best, which = torch.full((len(some), near), -torch.inf), torch.zeros(len(some), near, dtype=torch.long)
        for start in range(0, len(directions), PIECE // SIDE):
            cosines = directions[some] @ directions[start : start + PIECE // SIDE].T
            own = some - start
            inside = (own >= 0) & (own < cosines.shape[1])
            cosines[inside, own[inside]] = -torch.inf
            better = cosines.topk(min(near, cosines.shape[1]), dim=-1)
            both = torch.cat([best, better.values], 1).topk(near, dim=-1)
            which = torch.cat([which, better.indices + start], 1).gather(1, both.indices)
            best = both.values
        values.append(best)
        places.append(which)
    return {"near": torch.cat(places).numpy(), "near_cosine": torch.cat(values).numpy()}


def plane(coder: SparseCoder) -> Float[Tensor, "feature 2"]:
    """Decoder directions on their first two principal components."""
    directions = unit(coder.W_dec)
    centred = directions - directions.mean(0)
    _, basis = torch.linalg.eigh((centred.T @ centred).double())
    axes = basis[:, -2:].flip(1).float()
    # an axis has no sign of its own: its largest entry is made positive, so that two runs agree
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return centred @ axes


LogitEffects = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row vocab"]]


def logit_effects(subject: Subject, coder: SparseCoder, *, texts: int = 4) -> LogitEffects | None:
    """What a direction in the stream does to the logits: a function, or None where the dictionary does not write to it.

    The derivative along the direction at the mean final stream of a few rows of the model's own tokens, by central
    differences through the model's own head.
    """
    if coder.W_dec.shape[1] != subject.facts.d_model or not subject.facts.n_layers:
        return None
    generator = torch.Generator().manual_seed(0)
    width = min(32, subject.facts.context or 32)
    rows = torch.randint(subject.facts.d_vocab or 2, (texts, width), generator=generator).tolist()
    site = f"layer.{subject.facts.n_layers - 1}.resid_post"
    middle = subject.read(rows, site)[site].float().flatten(0, 1).mean(0)

    @torch.no_grad()
    def effects(directions: Tensor) -> Tensor:
        norms = directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        step = 0.05 * middle.norm().clamp(min=1e-6)
        moved = directions / norms * step
        up, down = (
            subject.unembed((middle + sign * moved).to(subject.dtype).to(subject.device)).float().cpu()
            for sign in (1, -1)
        )
        change = (up - down) / (2 * step) * norms
        return change - change.mean(-1, keepdim=True)

    return effects


def _logits(ends: LogitEffects | None, coder: SparseCoder, first: int, end: int, count: int) -> dict[str, np.ndarray]:
    if ends is None:
        nothing = np.zeros((end - first, 0))
        whole = nothing.astype(np.int64)
        return {"raised": whole, "raised_by": nothing, "lowered": whole, "lowered_by": nothing}
    out: dict[str, list[Tensor]] = {"raised": [], "raised_by": [], "lowered": [], "lowered_by": []}
    for start in range(first, end, 512):
        change = ends(coder.W_dec[start : min(end, start + 512)].float())
        for name, sign in (("raised", 1.0), ("lowered", -1.0)):
            best = (sign * change).topk(min(count, change.shape[1]), dim=-1)
            out[name].append(best.indices)
            out[f"{name}_by"].append(sign * best.values)
    return {name: torch.cat(parts).numpy() for name, parts in out.items()}


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet as parquet

    made = {}
    for name, column in columns.items():
        whole = np.issubdtype(column.dtype, np.integer)
        narrow = column.astype(np.int64 if name in ("place", "row") else np.int32 if whole else np.float32)
        if narrow.ndim == 1:
            made[name] = pyarrow.array(narrow)
        elif narrow.shape[1] == 0:
            made[name] = pyarrow.array([[]] * len(narrow), type=pyarrow.list_(pyarrow.from_numpy_dtype(narrow.dtype)))
        else:
            flat = pyarrow.array(np.ascontiguousarray(narrow).reshape(-1))
            offsets = np.arange(len(narrow) + 1, dtype=np.int32) * narrow.shape[1]
            made[name] = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), flat)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(made), buffer, compression="zstd", row_group_size=8192)
    return buffer.getvalue()


def rows_of(texts: Sequence[str], subject: Subject, *, length: int = 128) -> list[list[int]]:
    """Token ids of texts, cut into rows of at most `length`; a text never shares a row with another."""
    out = []
    for text in texts:
        ids = list(subject.tokenizer(text, verbose=False)["input_ids"])
        out += [ids[i : i + length] for i in range(0, len(ids), length)]
    return out
