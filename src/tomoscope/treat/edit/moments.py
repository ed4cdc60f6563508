"""Second moments of MLP keys: what a rank-one edit must leave alone, from any corpus, in one pass for all layers.

C = mean of k k^T over tokens, k the input of an MLP's output projection (`layer.N.mlp.post`), uncentred. Meng et al.
2022 (arXiv:2202.05262) take 100,000 articles; 2506.04226 finds that under 0.3 % of it does. So the tokens are counted
here, and a curve says what the last doubling changed: in C itself, and in the directions C^-1 k of keys held out of it,
which are what an edit uses. How it can mislead: fewer tokens than neurons make C singular (refused unless a ridge is
given); a corpus unlike the model's own text protects the wrong keys.

Steps: cut the corpus into windows; add each slab's products; at every doubling compare with the last; write a cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tomoscope.activations.harvest import Texts, harvest, windows
from tomoscope.activations.writing import weights_hash
from tomoscope.errors import DataError, EditError, UnavailableSiteError
from tomoscope.findings.files import write_bytes
from tomoscope.model import Subject

_BYTES = 256 << 20  # of one slab of keys
_POINTS = 5
_HELD_OUT = 64
PER_NEURON = 20
"""Tokens a neuron by default."""


@dataclass(frozen=True)
class MomentPoint:
    """The second moments after some tokens, against those after half as many.

    Attributes:
        tokens: so far.
        change: layer -> Frobenius norm of the change, relative to C.
        agreement: layer -> mean cosine between C^-1 k now and then, over held-out keys; None where C was singular.
    """

    tokens: int
    change: dict[int, float]
    agreement: dict[int, float | None]


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Uncentred second moments of keys.

    Attributes:
        values: layer -> [neuron, neuron], float64.
        tokens: that they are a mean over.
        curve: of convergence.
        model: hash of the weights.
        corpus: hash of the tokens.
    """

    values: dict[int, Float[Tensor, "neuron neuron"]]
    tokens: int
    curve: tuple[MomentPoint, ...]
    model: str
    corpus: str

    def at(self, layer: int) -> Float[Tensor, "neuron neuron"]:
        """Of one layer. Raises EditError where it was not computed."""
        if layer not in self.values:
            raise EditError(
                f"There are no second moments of layer {layer}, only of {sorted(self.values)}.",
                remedy="Compute them for the layer.",
            )
        return self.values[layer]

    def solve(
        self, layer: int, keys: Float[Tensor, "row neuron"], *, ridge: float = 0.0
    ) -> Float[Tensor, "row neuron"]:
        """C^-1 k of each key; the ridge is relative to the mean of C's diagonal.

        Raises:
            EditError: C is singular.
        """
        whole = self.at(layer)
        if ridge:
            whole = whole + ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
        out = torch.linalg.solve_ex(whole, keys.to(whole).T)
        short = self.tokens < len(whole) and not ridge  # rounding hides that it is singular
        if short or int(out.info) or not bool(torch.isfinite(out.result).all()):
            raise EditError(
                f"The second moments of layer {layer} over {self.tokens:,} tokens can't be inverted.",
                remedy=f"Give more text than its {len(whole):,} neurons, or a ridge (1e-3).",
            )
        return out.result.T

    def summary(self) -> dict[str, object]:
        """For the record."""
        last = asdict(self.curve[-1]) if self.curve else None
        return {"tokens": self.tokens, "corpus": self.corpus, "model": self.model, "last_doubling": last}


def second_moments(
    subject: Subject,
    texts: Texts,
    *,
    layers: Sequence[int] | None = None,
    tokens: int | None = None,
    held_out: int = _HELD_OUT,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SecondMoments:
    """Second moments of the keys of some layers, in one pass over a corpus.

    Args:
        subject: a decoder.
        texts: any corpus; read no further than `tokens`.
        layers: all with an MLP of one hidden layer, by default.
        tokens: at most; 20 a neuron by default.
        held_out: of the last tokens, kept out of C to see whether it has converged; 0 leaves that out.
        cache: a folder; what was computed for these weights, layers and tokens is read from it, else written to it.
        progress: called with (tokens done, tokens).

    Raises:
        UnavailableSiteError: no layer has such keys.
        DataError: hardly any text.
    """
    chosen = key_layers(subject, layers)
    width = subject.facts.d_mlp or 0
    limit = tokens or PER_NEURON * width
    held = [torch.tensor(w.ids) for w in windows(subject, texts, tokens=limit)]
    total = sum(map(len, held))
    if total <= 2 * held_out:
        raise DataError(f"The corpus has {total} tokens.", remedy="Give more text.")
    digest = hashlib.sha256()
    for ids in held:
        digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    names = {"model": weights_hash(subject), "corpus": digest.hexdigest(), "layers": chosen, "held_out": held_out}
    path = None
    if cache is not None:
        path = Path(cache) / f"moments-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:24]}.safetensors"
        found = _read(path)
        if found is not None:
            return found
    values, curve, done = _accumulate(subject, held, chosen, held_out, progress)
    made = SecondMoments(values, done, tuple(curve), str(names["model"]), str(names["corpus"]))
    if path is not None:
        _write(path, made)
    return made


def key_layers(subject: Subject, layers: Sequence[int] | None = None) -> list[int]:
    """Layers whose MLP has keys: those asked for, or all. Raises UnavailableSiteError where there are none."""
    blocks = subject.structure.blocks
    if layers is not None:
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise EditError(f"There is no layer {layer}; the model has {len(blocks)}.", remedy="Count from 0.")
            subject.resolve([f"layer.{layer}.mlp.post"])
        return sorted(set(layers))
    found = [i for i, block in enumerate(blocks) if "mlp.post" in block.taps and block.down]
    if not found:
        why = next((block.missing.get("mlp.post", "") for block in blocks), "it has no blocks")
        raise UnavailableSiteError(f"{subject.name} has no MLP with keys to edit: {why}.")
    return found


def _accumulate(
    subject: Subject, held: list[Tensor], layers: list[int], held_out: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, Tensor], list[MomentPoint], int]:  # fmt: skip
    sites = {layer: f"layer.{layer}.mlp.post" for layer in layers}
    width = subject.facts.d_mlp or 1
    chunk = max(256, _BYTES // (4 * width * len(layers)))
    apart: list[Tensor] = []
    while sum(map(len, apart)) < held_out:
        apart.append(held[-1][-(held_out - sum(map(len, apart))) :])
        held = [*held[:-1], held[-1][: len(held[-1]) - len(apart[-1])]]
        held = held if len(held[-1]) else held[:-1]
    total = sum(map(len, held))
    away = [slab.values for slab in harvest(subject, apart, list(sites.values()))] if apart else []
    keys_apart = {
        i: torch.cat([values[site] for values in away]).double() if away else None for i, site in sites.items()
    }
    marks = [total >> power for power in range(_POINTS, -1, -1) if total >> power > width]
    sums = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}
    before: dict[int, Tensor] = {}
    curve: list[MomentPoint] = []
    done = 0
    for slab in harvest(subject, held, list(sites.values()), chunk=chunk):
        start = 0
        while start < len(slab):
            mark = next((mark for mark in marks if mark > done), total)  # cut where the next point of the curve falls
            stop = min(len(slab), start + mark - done)
            for layer, site in sites.items():
                keys = slab.values[site][start:stop]
                keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
                sums[layer] += (keys.T @ keys).double()
            done, start = done + stop - start, stop
            if done in marks:
                now = {layer: value / done for layer, value in sums.items()}
                if before:
                    curve.append(_point(done, now, before, keys_apart))
                before = now
        if progress is not None:
            progress(done, total)
    return {layer: value / done for layer, value in sums.items()}, curve, done


def _point(
    tokens: int, now: dict[int, Tensor], before: dict[int, Tensor], keys: dict[int, Tensor | None]
) -> MomentPoint:
    change = {layer: float((value - before[layer]).norm() / value.norm()) for layer, value in now.items()}
    return MomentPoint(tokens, change, {i: _agreement(value, before[i], keys[i]) for i, value in now.items()})


def _agreement(now: Tensor, before: Tensor, keys: Tensor | None) -> float | None:
    if keys is None or not len(keys):
        return None
    pair = [torch.linalg.solve_ex(one, keys.T) for one in (now, before)]
    if any(int(one.info) or not bool(torch.isfinite(one.result).all()) for one in pair):
        return None
    return float(torch.cosine_similarity(pair[0].result, pair[1].result, dim=0).mean())


def _write(path: Path, made: SecondMoments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"tokens": made.tokens, "curve": [asdict(point) for point in made.curve], "model": made.model}
    told["corpus"] = made.corpus
    write_bytes(path, save({str(k): v for k, v in made.values.items()}, metadata={"moments": json.dumps(told)}))


def _read(path: Path) -> SecondMoments | None:
    """What a cache holds; None where it holds nothing whole."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["moments"])
            values = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        curve = tuple(
            MomentPoint(p["tokens"], _by_layer(p["change"]), _by_layer(p["agreement"])) for p in told["curve"]
        )
        return SecondMoments(values, told["tokens"], curve, told["model"], told["corpus"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _by_layer(table: dict[str, Any]) -> dict[int, Any]:
    return {int(layer): value for layer, value in table.items()}


def random_moments(like: SecondMoments, layers: Iterable[int], *, seed: int) -> SecondMoments:
    """Second moments with the same spectra in random directions: the control that forgets which keys are in use."""
    draw = torch.Generator().manual_seed(seed)
    values = {}
    for layer in layers:
        whole = like.at(layer)
        basis = torch.linalg.qr(torch.randn(whole.shape, generator=draw, dtype=whole.dtype))[0]
        values[layer] = basis @ torch.diag(torch.linalg.eigvalsh(whole)) @ basis.T
    return SecondMoments(values, like.tokens, (), like.model, "random directions")
