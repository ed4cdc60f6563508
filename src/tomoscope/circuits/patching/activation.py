"""Activation patching: which places carry what tells the clean prompt from the corrupted one.

Denoising runs the corrupted prompt with one clean activation put back (what suffices to restore the answer); noising
runs the clean prompt with one corrupted activation (what is needed for it). Attribution patching estimates the same
grid to first order from one forward and one backward.

    grid = activation_patching(subject, pairs, part="resid_pre")        # [layer, position, pair]
    grid = activation_patching(subject, pairs, part="attn.z")           # [layer, position, head, pair]

How it can mislead: a patch in the residual stream moves all that was written so far, so a band in the grid says where
information *is*, not who computed it; backup heads hide what noising removes; attribution patching fails where
attention saturates. Sources: Vig et al. 2020, Meng et al. 2022, Zhang & Nanda 2024 (arXiv:2309.16042), Nanda 2023
(attribution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import LogitDifference, Metric, normalised
from tomoscope.circuits.patching.engine import PARTS, Engine
from tomoscope.errors import AlignmentError, SiteError, UnavailableSiteError
from tomoscope.model import Batch, Encoded, Site, Subject
from tomoscope.model.memory import SHARE, free_bytes

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts as padded batches of one width, row by row aligned.

    Attributes:
        clean: the clean prompts.
        corrupted: the corrupted prompts.
        answers: [pair, answer] token ids, -1 where a pair has fewer.
        wrong: [pair, answer] likewise.
    """

    clean: Batch
    corrupted: Batch
    answers: Tensor
    wrong: Tensor

    def __len__(self) -> int:
        return len(self.clean)

    def metric(self) -> LogitDifference:
        """The logit difference of right and wrong answers."""
        return LogitDifference(self.answers, self.wrong)


def encode_pairs(subject: Subject, pairs: Any) -> Pairs:
    """Token batches for a `data.PairSet` (or its encoded form).

    Raises:
        AlignmentError: clean and corrupted prompts of a pair differ in length.
    """
    aligned = pairs.encode(subject.tokenizer) if hasattr(pairs, "encode") else pairs
    clean = [Encoded(ids, spans) for ids, spans in zip(aligned.clean_ids, aligned.spans, strict=True)]
    corrupted = [Encoded(ids, spans) for ids, spans in zip(aligned.corrupted_ids, aligned.corrupted_spans, strict=True)]
    for row, (left, right) in enumerate(zip(clean, corrupted, strict=True)):
        if len(left.ids) != len(right.ids):
            raise AlignmentError(f"Pair {row} does not align: {len(left.ids)} tokens against {len(right.ids)}.")
    answers, wrong = torch.as_tensor(aligned.answer_ids), torch.as_tensor(aligned.wrong_ids)
    return Pairs(subject.tokens(clean), subject.tokens(corrupted), answers, wrong)


@dataclass(frozen=True)
class PatchGrid:
    """A grid of patches, each made alone.

    Attributes:
        values: metric of each patched run, [layer, position, pair] or [layer, position, head, pair]; NaN where a layer
            has no
            such part.
        clean: [pair] metric of the clean run.
        corrupted: [pair] metric of the corrupted run.
        part: what was patched.
        denoising: clean activations into the corrupted run (False: the reverse).
        positions: what the position axis holds.
        metric: the metric's name.
        mode: how the engine ran ("sliced", "suffix", "plain"), or "linear" for the estimate.
        sites: names of the layers' sites.
    """

    values: Float[Tensor, "layer position *rest"]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    part: str
    denoising: bool
    positions: tuple[str, ...]
    metric: str
    mode: str
    sites: tuple[str, ...]

    @property
    def effect(self) -> Float[Tensor, "layer position *rest"]:
        """Per pair: how far the patch moved the metric from its base run."""
        return self.values - (self.corrupted if self.denoising else self.clean)

    @property
    def normalised(self) -> Float[Tensor, "layer position *head"]:
        """Mean over pairs as a share of the clean-corrupted gap: denoising 0 to 1, noising 1 to 0."""
        return normalised(self.values, clean=self.clean, corrupted=self.corrupted)


def columns_for(pairs: Pairs, positions: Sequence[int | str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """[pair, position] columns and their names; all positions by default, where all pairs have the same length."""
    if positions is None:
        lengths = set(pairs.clean.lengths)
        if len(lengths) > 1:
            raise AlignmentError(
                f"The pairs have different lengths ({sorted(lengths)} tokens), so their positions do not line up.",
                remedy='Name positions, for example positions=["subject", "last"], or group the pairs by length.',
            )
        columns = pairs.clean.columns(list(range(lengths.pop())))[0]
        assert columns is not None
        return columns, tuple(str(i) for i in range(columns.shape[1]))
    columns = pairs.clean.columns(list(positions))[0]
    assert columns is not None
    return columns, tuple(str(p) for p in positions)


def activation_patching(
    subject: Subject,
    pairs: Any,
    *,
    part: str = "resid_pre",
    denoising: bool = True,
    metric: Metric | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int | str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PatchGrid:
    """Patch every layer x position (x head) alone and measure.

    Args:
        subject: the model.
        pairs: a `data.PairSet`, or `Pairs`.
        part: "resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out", or "attn.z" for every head.
        denoising: clean into corrupted (True) or corrupted into clean.
        metric: the logit difference by default.
        layers: all by default.
        positions: see `Batch.columns`; all by default.
        seed: of the patches sampled to check the engine.
        progress: called with layers done and in all.

    Raises:
        UnavailableSiteError: no layer has the part.
        AlignmentError: positions that do not line up.
    """
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    metric = metric or made.metric()
    columns, names = columns_for(made, positions)
    wanted = list(range(subject.facts.n_layers) if layers is None else layers)
    there = _layers_with(subject, part, wanted)
    heads = subject.facts.n_heads if part == "attn.z" else 1
    precision = torch.float64 if subject.dtype == torch.float64 else torch.float32
    out = torch.full((len(wanted), columns.shape[1], heads, len(made)), torch.nan, dtype=precision)
    modes, step = set(), _pairs_at_once(subject, made)
    starts = range(0, len(made), step)
    for chunk, start in enumerate(starts):
        rows = slice(start, start + step)
        source, base = made.clean.take(rows), made.corrupted.take(rows)
        if not denoising:
            source, base = base, source
        told = None if progress is None else _shifted(progress, chunk * len(there), len(starts) * len(there))
        grid, mode = _chunk(subject, source, base, part, there, columns[rows], _Offset(metric, start), seed, told)
        out[[wanted.index(layer) for layer in there], :, :, rows] = grid
        modes.add(mode)
    ends = [_metric_of(subject, batch, metric) for batch in (made.clean, made.corrupted)]
    values = out if part == "attn.z" else out[:, :, 0]
    sites = tuple(f"layer.{layer}.{part}" for layer in wanted)
    return PatchGrid(values, ends[0], ends[1], part, denoising, names, metric.name, " and ".join(sorted(modes)), sites)


def _pairs_at_once(subject: Subject, pairs: Pairs) -> int:
    """Pairs whose streams, keys and values of every layer fit into memory together."""
    facts = subject.facts
    kept = facts.n_layers * max(pairs.clean.width, 1) * (facts.d_model or 1) * 8 * max(4, subject.dtype.itemsize)
    return max(1, min(len(pairs), int(free_bytes(subject.device) * SHARE) // kept))


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


@dataclass(frozen=True, eq=False)
class _Offset:
    """A metric for pairs that are a piece of a longer list, from `start` on."""

    metric: Metric
    start: int

    @property
    def name(self) -> str:
        return self.metric.name

    @property
    def tokens(self) -> Tensor | None:
        return self.metric.tokens

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return self.metric(logits, rows + self.start)


def _chunk(
    subject: Subject,
    source: Batch,
    base: Batch,
    part: str,
    layers: Sequence[int],
    columns: Tensor,
    metric: Metric,
    seed: int,
    progress: Progress | None,
) -> tuple[Tensor, str]:
    """[layer, position, head, pair] of some pairs, and how the engine ran."""
    engine, other = Engine(subject, base), _run_values(subject, source, part, layers)
    rows = torch.arange(len(base))[:, None]
    middle = layers[len(layers) // 2]
    engine.check(part, columns, other[middle][rows, columns], metric, layer=middle, seed=seed)
    out = engine.grid(layers, part, columns, {layer: other[layer][rows, columns] for layer in layers}, metric)
    if progress is not None:
        progress(len(layers), len(layers))
    return out, engine.mode


def _layers_with(subject: Subject, part: str, layers: Sequence[int]) -> list[int]:
    if part not in PARTS:
        raise SiteError(f"{part!r} can't be patched in a grid.", remedy=f"It is one of {', '.join(PARTS)}.")
    known = subject.sites()
    there = [layer for layer in layers if known[f"layer.{layer}.{part}"].available]
    if not there:
        reason = known[f"layer.{layers[0]}.{part}"].reason if layers else "no layer was named"
        raise UnavailableSiteError(f"No layer can give {part}: {reason}.")
    return there


def _run_values(subject: Subject, batch: Batch, part: str, layers: Sequence[int]) -> dict[int, Tensor]:
    acts = subject.read(batch, *(Site(part, layer) for layer in layers), keep_device=True)
    return {layer: acts[f"layer.{layer}.{part}"] for layer in layers}


def _metric_of(subject: Subject, batch: Batch, metric: Metric) -> Tensor:
    logits = subject.last_logits(batch)
    tokens = metric.tokens
    return metric(logits if tokens is None else logits[:, tokens.to(logits.device)], torch.arange(len(batch))).cpu()


def attribution_patching(
    subject: Subject,
    pairs: Any,
    *,
    part: str = "resid_pre",
    denoising: bool = True,
    metric: Metric | None = None,
    positions: Sequence[int | str] | None = None,
) -> PatchGrid:
    """The linear estimate of `activation_patching`: (other - base) . gradient at the base, one forward and one
    backward.

    The grid holds base metric + estimate, so that it compares with the exact one cell by cell.
    """
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    metric = metric or made.metric()
    columns, names = columns_for(made, positions)
    layers = list(range(subject.facts.n_layers))
    there = _layers_with(subject, part, layers)
    source, base = (made.clean, made.corrupted) if denoising else (made.corrupted, made.clean)

    def of(logits: Tensor, batch: Batch) -> Tensor:
        rows = torch.arange(len(batch))
        last = logits[rows, batch.last.to(logits.device)]
        tokens = metric.tokens
        return metric(last if tokens is None else last[:, tokens.to(last.device)], batch.indices)

    sites = [f"layer.{layer}.{part}" for layer in there]
    out = subject.gradients(base, of, sites)
    other = subject.read(source, *sites)
    heads = subject.facts.n_heads if part == "attn.z" else 1
    values = torch.full((len(layers), columns.shape[1], heads, len(made)), torch.nan)
    rows = torch.arange(len(made))[:, None]
    for layer, site in zip(there, sites, strict=True):
        product = (other[site] - out.values[site]).float() * out.gradients[site].float()
        score = product.sum(-1)[rows, columns]
        values[layer] = (score if part == "attn.z" else score[..., None]).permute(1, 2, 0) + out.metric
    ends = [_metric_of(subject, batch, metric) for batch in (made.clean, made.corrupted)]
    shaped = values if part == "attn.z" else values[:, :, 0]
    return PatchGrid(
        shaped,
        ends[0],
        ends[1],
        part,
        denoising,
        names,
        metric.name,
        "linear",
        tuple(f"layer.{i}.{part}" for i in layers),
    )
