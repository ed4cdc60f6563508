"""Make an attribution graph of a prompt: freeze, sweep, check, keep.

    graph = attribution_graph(subject, transcoders, "The capital of Texas is")

Every active feature has a row, or (`max_features`) those that matter most, found by expanding the graph from the logits
on; see `ranked`. Each row is checked to sum to its pre-activation. Source: Ameisen et al. 2025, "Circuit Tracing";
Hanna et al. 2025, circuit-tracer, whose numbers this agrees with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.graph import AttributionGraph
from tomoscope.circuits.attribution.ranked import expanded
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.rows import Collector, Compressed
from tomoscope.circuits.attribution.sweep import Rows, Sweep
from tomoscope.circuits.attribution.targets import (
    LogitTargets,
    feature_biases,
    feature_rows,
    logit_biases,
    logit_rows,
    logit_targets,
)
from tomoscope.errors import DataError, ModelError, ResourceError
from tomoscope.features import Transcoders
from tomoscope.model import Subject
from tomoscope.model.inputs import Prompts
from tomoscope.model.memory import free_bytes

Progress = Callable[[int, int], None]
GAP = {torch.float64: 1e-4, torch.float32: 1e-3}
COARSE_GAP = 0.1
"""How far a row may be from its sum, relative to what is summed; models in half precision round at every step."""


@torch.no_grad()
def attribution_graph(
    subject: Subject,
    transcoders: Transcoders,
    prompt: Prompts,
    *,
    targets: Sequence[int | str] | LogitTargets | None = None,
    max_features: int | None = None,
    keep: float = 1.0,
    zeroed: int = 1,
    tile: int | None = None,
    replacement: LocalReplacement | None = None,
    progress: Progress | None = None,
) -> AttributionGraph:
    """The attribution graph of one prompt.

    Args:
        subject: a decoder.
        transcoders: for each of its layers.
        prompt: one prompt.
        targets: tokens whose logits are explained (ids, or texts of one token), or `direction_targets`; by default the
            fewest that reach 0.95 of the probability, at most 10.
        max_features: of the active features only so many get rows, those that matter most; all by default.
        keep: share of each row's absolute mass that is kept as edges; what is left out is kept as a sum.
        zeroed: first positions without features and errors.
        tile: numbers in the sweep's state: bounds the memory.
        replacement: made before, for several graphs of one prompt.
        progress: called with rows done and rows in all.

    Raises:
        ModelError: a row does not sum to its value: the model is not what was found, and the graph would be wrong.
        ResourceError: the edges would not fit in memory.
    """
    if not 0 < keep <= 1:
        raise DataError(f"keep={keep} is no share of a row's mass.", remedy="It is more than 0 and at most 1.")
    frozen = replacement or LocalReplacement.of(subject, transcoders, prompt, zeroed=zeroed)
    chosen = targets if isinstance(targets, LogitTargets) else logit_targets(frozen, targets)
    sweep = Sweep(frozen, tile=tile)
    whole = max_features is None or max_features >= frozen.n_active
    if whole:
        every = torch.arange(frozen.n_active, device=frozen.tokens.device)
        _check_memory(frozen, len(every), keep)
        made = sweep_rows(sweep, every, chosen, keep=keep, progress=progress)
    else:
        every, made = expanded(sweep, chosen, max_features or 0, keep=keep, progress=progress)
    settings = {"keep": keep, "n_active": frozen.n_active, "max_features": max_features, "kind": _kind(transcoders)}
    graph = assembled(frozen, chosen, every, made, settings)
    worst = GAP.get(subject.dtype, COARSE_GAP)
    if graph.gap > worst:
        raise ModelError(
            f"A row of the graph misses its sum by {graph.gap:.2g} of what is summed (at most {worst:g} is rounding).",
            remedy="The model computes what its frozen parts don't; please report its family.",
        )
    return graph


def sweep_rows(
    sweep: Sweep,
    which: Int[Tensor, " feature"],
    targets: LogitTargets | None,
    *,
    keep: float = 1.0,
    progress: Progress | None = None,
) -> Compressed:
    """Rows of some active features, then of logits, over all sources of the replacement model."""
    replacement = sweep.replacement
    logits = 0 if targets is None else len(targets)
    collector = Collector(len(which) + logits, keep)
    back = sweep.columns.argsort()
    done = 0
    parts: list[tuple[Rows, int]] = [(feature_rows(replacement, which), 0)] if len(which) else []
    if targets is not None:
        parts.append((logit_rows(replacement, targets), len(which)))
    for rows, first in parts:
        for some, block in sweep.run(rows):
            collector.add(some + first, block.index_select(1, back))
            done += len(some)
            if progress is not None:
                progress(done, len(which) + logits)
    return collector.done(replacement.tokens.dtype)


def assembled(
    replacement: LocalReplacement,
    targets: LogitTargets,
    which: Int[Tensor, " feature"],
    made: Compressed,
    settings: Mapping[str, Any],
) -> AttributionGraph:
    """A graph of rows over the sources that are nodes: some active features, all errors and tokens."""
    subject = replacement.subject
    features = torch.stack([replacement.layer, replacement.position, replacement.feature], dim=1)[which].cpu()
    texts = [subject.tokenizer.decode([i]) if subject.tokenizer is not None else str(i) for i in replacement.ids]
    values = torch.cat([replacement.activation[which], targets.values.to(replacement.tokens)]).cpu()
    biases = [feature_biases(replacement, which), logit_biases(replacement, targets)]
    return AttributionGraph(
        subject.name, replacement.transcoders.scan, replacement.ids, tuple(texts), replacement.n_layers, features,
        replacement.activation[which].cpu(), targets.ids, targets.names, targets.probabilities.cpu(),
        made.starts, made.columns, made.weights, values, torch.cat(biases).cpu(), made.rest, made.mass,
        replacement.zeroed, settings,
    )  # fmt: skip


def dense_rows(sweep: Sweep, rows: Rows) -> Float[Tensor, "row source"]:
    """Rows as one array, sources in the graph's order; for few rows."""
    back = sweep.columns.argsort()
    out = sweep.replacement.tokens.new_zeros(len(rows), sweep.replacement.n_sources)
    for some, block in sweep.run(rows):
        out[some] = block.index_select(1, back)
    return out


def _kind(transcoders: Transcoders) -> str:
    return "cross layer transcoder" if len(transcoders.targets(0)) > 1 else "transcoder"


def _check_memory(replacement: LocalReplacement, n_rows: int, keep: float) -> None:
    """Whether all edges fit: at most half of all pairs have one."""
    if keep < 1:
        return
    needed = n_rows * replacement.n_sources // 2 * (8 + 2 * replacement.tokens.element_size())
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise ResourceError(
            f"The graph's {n_rows:,} rows may have {needed / 2**30:.1f} GiB of edges; {free / 2**30:.1f} GiB are free.",
            remedy="Give keep=0.99 (small edges as one sum) or max_features.",
        )
