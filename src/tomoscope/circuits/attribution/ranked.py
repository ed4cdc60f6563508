"""A graph of the features that matter most, expanded from the logits on, with an exact bound on what is missed.

A prompt of some hundred tokens has tens of thousands of active features, few of which matter. So the logits' rows come
first; then, in rounds, rows of the features that most influence reaches. A row's absolute shares sum to 1, so no more
influence can pass through the unexpanded features than has reached them: that sum bounds what any node's influence can
still gain, and stands in the graph's scores (`Scores.unexpanded`).

How it can mislead: a feature whose influence would come through unexpanded features only is found late; the bound says
by how much at most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.rows import Collector, Compressed
from tomoscope.circuits.attribution.sweep import Rows, Sweep
from tomoscope.circuits.attribution.targets import LogitTargets, feature_rows, logit_rows

ROUNDS = 8
"""In how many rounds the rows are expanded: more find the best features more surely, and make smaller products."""


def expanded(
    sweep: Sweep,
    targets: LogitTargets,
    max_features: int,
    *,
    keep: float = 1.0,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Int[Tensor, " feature"], Compressed]:
    """Rows of the features that matter most.

    Args:
        sweep: of the replacement model.
        targets: the logits to start from.
        max_features: how many features get rows.
        keep: share of each row's absolute mass that is kept as edges.
        rounds: in how many steps.
        progress: called with rows done and rows in all.

    Returns:
        The numbers of those features, ascending; their rows and the logits' rows over the sources that are nodes.
    """
    replacement = sweep.replacement
    back = sweep.columns.argsort()
    n_active, n_sources = replacement.n_active, replacement.n_sources
    visited = torch.zeros(n_active, dtype=torch.bool)
    # whole rows are needed until it is known which features are nodes
    order: list[Tensor] = []
    pieces: list[Compressed] = []
    logits = _swept(sweep, logit_rows(replacement, targets), back)
    step = max(1, -(-max_features // rounds))
    while int(visited.sum()) < max_features:
        reached = _reached(replacement, targets, logits, order, pieces)[:n_active]
        reached[visited] = -1.0
        count = min(step, max_features - int(visited.sum()))
        chosen = reached.topk(count).indices.sort().values
        visited[chosen] = True
        order.append(chosen)
        pieces.append(_swept(sweep, feature_rows(replacement, chosen.to(back.device)), back))
        if progress is not None:
            progress(int(visited.sum()), max_features)
    which = torch.nonzero(visited)[:, 0]
    nodes = torch.cat([which, torch.arange(n_active, n_sources)])
    place = torch.full((n_sources,), -1)
    place[nodes] = torch.arange(len(nodes))
    collector = Collector(len(which) + len(targets), keep)
    for chosen, piece in zip([*order, None], [*pieces, logits], strict=True):
        rows = torch.arange(len(which), len(which) + len(targets)) if chosen is None else place[chosen]
        _narrowed(collector, rows, piece, place, len(nodes))
    return which.to(back.device), collector.done(replacement.tokens.dtype)


def _swept(sweep: Sweep, rows: Rows, back: Tensor) -> Compressed:
    collector = Collector(len(rows))
    for some, block in sweep.run(rows):
        collector.add(some, block.index_select(1, back))
    return collector.done(sweep.replacement.tokens.dtype)


def _reached(
    replacement: LocalReplacement,
    targets: LogitTargets,
    logits: Compressed,
    order: list[Tensor],
    pieces: list[Compressed],
) -> Float[Tensor, " source"]:
    """What of the logits' probability reaches each source over expanded rows."""
    out = torch.zeros(replacement.n_sources, dtype=logits.weights.dtype)
    layer = replacement.layer.cpu()

    def passed(piece: Compressed, rows: Tensor, given: Tensor) -> None:
        counts = piece.starts[1:] - piece.starts[:-1]
        share = given / piece.mass[rows].clamp(min=1e-30)
        each = torch.repeat_interleave(torch.arange(len(rows)), counts[rows])
        within = torch.arange(len(each)) - torch.repeat_interleave(counts[rows].cumsum(0) - counts[rows], counts[rows])
        place = piece.starts[rows][each] + within
        out.index_add_(0, piece.columns[place].long(), piece.weights[place].abs() * share[each])

    passed(logits, torch.arange(len(targets)), targets.probabilities.cpu().to(out))
    for one in reversed(range(replacement.n_layers)):
        for chosen, piece in zip(order, pieces, strict=True):
            rows = torch.nonzero(layer[chosen] == one)[:, 0]
            if len(rows):
                passed(piece, rows, out[chosen[rows]].clone())
    return out


def _narrowed(collector: Collector, rows: Tensor, piece: Compressed, place: Tensor, width: int) -> None:
    """Rows over all sources, as rows over those that are nodes; the others go into the rest."""
    for some in torch.arange(len(rows)).split(256):
        dense = torch.zeros(len(some), width + 1, dtype=piece.weights.dtype)
        first, last = int(piece.starts[some[0]]), int(piece.starts[some[-1] + 1])
        counts = piece.starts[some + 1] - piece.starts[some]
        row = torch.repeat_interleave(torch.arange(len(some)), counts)
        column = place[piece.columns[first:last].long()]
        weight = piece.weights[first:last]
        inside = column >= 0
        dense[row[inside], column[inside]] = weight[inside]
        rest = torch.zeros(len(some), dtype=dense.dtype).index_add_(0, row[~inside], weight[~inside])
        collector.add(rows[some], dense[:, :width], rest=rest, mass=piece.mass[some])
