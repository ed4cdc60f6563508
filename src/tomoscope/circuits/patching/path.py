"""Path patching: the effect of senders on the metric through the inputs of named receivers alone.

    effect = path_patching(subject, pairs, ["a9.h6", "a9.h9"], ["a10.h7<q>"])      [sender, pair]
    effect = path_patching(subject, pairs, senders, ["logits"], frozen="heads and MLPs")    direct effects

Each sender's output is replaced (by its value in the corrupted prompt); what changes by it is let through to the
receivers only; the receivers, and all that follows them, are computed from that. What may carry the change from sender
to receiver is the choice that must be said:

- `frozen="heads"` (Wang et al. 2023): all heads but the sender keep their clean output, MLPs are computed again, so
  a path may run through any MLPs in between.
- `frozen="heads and MLPs"`: only the direct edge through the residual stream. This is the edge resampling of circuit
  discovery, with MLPs as nodes.

How it can mislead: the two give different numbers for the same heads, and papers do not always say which they used;
with "heads" a receiver gets the input of the run with the others held, with "heads and MLPs" it also sees what an
earlier receiver changed; norms are part of the receiver, so a change is read at a new scale.

Steps (for "heads"): run with the sender replaced and all attention writes held, keeping what the MLPs then write; give
the receivers that, by a rewired run in which the edges from the sender and the MLPs carry those values.

Sources: Wang et al. 2023 (arXiv:2211.00593); Goldowsky-Dill et al. 2023 (arXiv:2304.05969).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.graph import Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs, encode_pairs
from tomoscope.circuits.scores.gradients import Norms
from tomoscope.circuits.scores.methods import Work
from tomoscope.circuits.scores.products import Expansion
from tomoscope.circuits.wiring.ablation import Ablation, Choices
from tomoscope.circuits.wiring.ending import calling_arguments
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import SourceRun, Sources, Watch, read_sources
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError, SiteError, nearest
from tomoscope.model import Batch, Subject
from tomoscope.model.probe import main_input, unwrap

Frozen = Literal["heads", "heads and MLPs"]


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What each sender (or set of them) does through the receivers.

    Attributes:
        values: [sender, pair], metric of the patched run.
        clean: [pair], metric of the clean run.
        senders: names of the sources that were patched in each row.
        receivers: names of the destinations.
        frozen: what kept its clean output between sender and receiver.
        metric: the metric's name.
        choices: the six choices of the ablation.
    """

    values: Float[Tensor, "sender pair"]
    clean: Float[Tensor, " pair"]
    senders: tuple[tuple[str, ...], ...]
    receivers: tuple[str, ...]
    frozen: str
    metric: str
    choices: Choices

    @property
    def effect(self) -> Float[Tensor, " sender"]:
        """Mean over pairs of the metric that is lost (clean less patched)."""
        return (self.clean - self.values).mean(-1)


def path_patching(
    subject: Subject,
    pairs: Any,
    senders: Sequence[str | Sequence[str]],
    receivers: Sequence[str],
    *,
    frozen: Frozen = "heads",
    graph: Graph | None = None,
    metric: Metric | None = None,
    ablation: Ablation | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PathEffects:
    """Patch each sender towards some receivers.

    Args:
        subject: the model.
        pairs: a `data.PairSet`, or `Pairs`.
        senders: sources, each patched alone; a sequence of names is patched together.
        receivers: destinations ("a9.h6<q>", "m3", "logits"); the name of a head stands for all of its inputs.
        frozen: what keeps its clean output in between; see the module's docstring.
        graph: `Graph.of(subject)` by default.
        metric: of the pairs; their logit difference by default.
        ablation: what a sender is replaced by; its value in the corrupted prompt by default.
        batch_size: pairs a batch; as many as fit by default.
        progress: called with pairs done and in all.

    Raises:
        SiteError: an unknown node.
        DataError: a sender that comes before none of the receivers.
    """
    if frozen not in ("heads", "heads and MLPs"):
        raise DataError(f"frozen={frozen!r} is unknown.", remedy="It is 'heads' or 'heads and MLPs'.")
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    ablation, ports = ablation or Ablation.paired(made.corrupted), Ports.of(subject, graph)
    metric, sets = metric or made.metric(), tuple((s,) if isinstance(s, str) else tuple(s) for s in senders)
    rows = [[_row(ports.graph, name) for name in names] for names in sets]
    columns = [column for name in receivers for column in _columns(ports.graph, name)]
    if not rows or not columns:
        raise DataError("Path patching needs a sender and a receiver.")
    for names, mine in zip(sets, rows, strict=True):
        if not bool(_edges(ports.graph, mine, columns).any()):
            raise DataError(f"No receiver is computed after {' and '.join(names)}, so there is no path to patch.")
    work = Work(subject, ports, Norms(subject), made.clean, ablation, metric, batch_size, progress)
    values, clean = [], []
    for piece, batch, numbers in work.pieces(1, gradients=False):
        ablated = work.replacement.take(piece)
        run = read_sources(subject, batch, ports, writes=True)
        clean.append(work.clean_metrics(run, numbers))
        if frozen == "heads":
            values.append(_through_mlps(work, batch, numbers, run, ablated, rows, columns))
        else:
            wiring = Wiring(subject, batch, ablation=ablation, ports=ports, ablated=ablated, numbers=numbers)
            masks = torch.stack([~_edges(ports.graph, mine, columns) for mine in rows])
            values.append(wiring.run(masks, metric))
    names = tuple(ports.graph.destinations[column] for column in columns)
    choices = ablation.choices(component="paths", set=f"each sender's paths, {frozen} frozen")
    return PathEffects(torch.cat(values, 1), torch.cat(clean), sets, names, frozen, metric.name, choices)


def _row(graph: Graph, name: str) -> int:
    if name not in graph.sources:
        raise SiteError(f"There is no source {name!r} in the graph.", remedy=nearest(name, graph.sources))
    return graph.sources.index(name)


def _columns(graph: Graph, name: str) -> list[int]:
    if name in graph.destinations:
        return [graph.destinations.index(name)]
    if name in graph.sources and graph.inputs_of(name):
        return graph.inputs_of(name)
    raise SiteError(f"There is no destination {name!r} in the graph.", remedy=nearest(name, graph.destinations))


def _edges(graph: Graph, rows: Sequence[int], columns: Sequence[int]) -> Bool[Tensor, "source destination"]:
    out = torch.zeros_like(graph.allowed)
    out[torch.tensor(list(rows))[:, None], torch.tensor(list(columns))[None]] = True
    return out & graph.allowed


# ---- through the MLPs in between


@torch.no_grad()
def _through_mlps(
    work: Work,
    batch: Batch,
    numbers: Tensor,
    clean: SourceRun,
    ablated: Sources,
    rows: Sequence[Sequence[int]],
    columns: Sequence[int],
) -> Float[Tensor, "sender pair"]:
    """Senders x pairs as the rows of batches."""
    graph, subject = work.ports.graph, work.subject
    pairs = len(batch)
    fit = max(1, subject.rows_per_call(max(batch.width, 1)) // (4 * pairs))
    out = []
    for start in range(0, len(rows), fit):
        chunk = rows[start : start + fit]
        repeated = torch.arange(pairs).repeat(len(chunk))
        tiled = batch.take(repeated)
        given = _senders_alone(work, clean.sources, ablated, chunk)
        outs = _held_heads(work, tiled, clean, given, len(chunk))
        given = replace(given, outs=outs)
        wiring = Wiring(
            subject, tiled, ablation=work.ablation, ports=work.ports, ablated=given, numbers=numbers[repeated]
        )
        # every source's edges to the receivers carry these values; those of sources that kept theirs are as they were
        mask = ~_edges(graph, range(len(graph.sources)), columns)
        out.append(wiring.run(mask[None], work.metric).reshape(len(chunk), pairs))
    return torch.cat(out)


def _senders_alone(work: Work, clean: Sources, ablated: Sources, rows: Sequence[Sequence[int]]) -> Sources:
    """The clean sources tiled over senders, each with its sender's ablated value."""
    writers = work.ports.graph.writers

    def rowwise(kind: str, layer: int, own: Tensor, other: Tensor) -> Tensor:
        pieces = []
        for mine in rows:
            nodes = [writers[row] for row in mine if writers[row].kind == kind and writers[row].layer == layer]
            value = own
            if nodes and kind == "head":
                value, wanted = own.clone(), [node.head for node in nodes]
                value[:, :, wanted] = other.expand_as(own)[:, :, wanted]
            elif nodes:
                value = other.expand_as(own)
            pieces.append(value)
        return torch.cat(pieces)

    position = None
    if clean.position is not None and ablated.position is not None:
        position = rowwise("position", -1, clean.position, ablated.position)
    return Sources(
        rowwise("embed", -1, clean.embed, ablated.embed),
        position,
        {layer: rowwise("head", layer, value, ablated.heads[layer]) for layer, value in clean.heads.items()},
        {layer: rowwise("mlp", layer, value, ablated.outs[layer]) for layer, value in clean.outs.items()},
        {layer: rowwise("attention", layer, value, ablated.whole[layer]) for layer, value in clean.whole.items()},
    )


def _held_heads(
    work: Work, tiled: Batch, clean: SourceRun, given: Sources, repeats: int
) -> dict[int, Float[Tensor, "row position d_model"]]:
    """Run with each layer's attention writing what it wrote in the clean run plus its sender's difference; layer ->
    what each MLP wrote (a sender's own ablated value where it is one).
    """
    subject, ports, model = work.subject, work.ports, work.subject.model
    own = clean.sources.map(lambda value: value.repeat(repeats, *([1] * (value.dim() - 1))))
    expansion = Expansion(subject, ports, given.zip(own, torch.sub))

    def difference(layer: int, *kinds: str) -> Tensor | float:
        nodes = [(i, w) for i, w in enumerate(ports.graph.writers) if w.layer == layer and w.kind in kinds]
        kind = nodes[0][1].kind if nodes else ""
        return expansion.of(layer, kind, [i for i, _ in nodes]).sum(0) if nodes else 0.0

    outs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in range(ports.graph.n_layers):
            attention, mlp = ports.attention[layer], ports.mlp[layer]
            if attention is not None:
                wrote = clean.writes[layer].repeat(repeats, 1, 1)
                wrote = (wrote + difference(layer, "head", "attention")) / attention.factor
                module = model.get_submodule(attention.writer)
                stack.callback(module.register_forward_hook(_written(wrote)).remove)
            if mlp is not None:
                sends = (given.outs[layer] != own.outs[layer]).flatten(1).any(1)
                module, value = model.get_submodule(mlp.writer), given.outs[layer] / mlp.factor
                stack.callback(module.register_forward_hook(_written(value, sends)).remove)
        first = model.get_submodule(subject.structure.blocks[0].path)
        stream = clean.streams[0].repeat(repeats, 1, 1) + difference(-1, "embed") + difference(-1, "position")
        stack.callback(first.register_forward_pre_hook(_entered(stream), with_kwargs=True).remove)
        nothing = lambda layer, value: None  # noqa: E731
        watch = Watch(subject, ports, first=0, rows=len(tiled), heads=nothing, whole=nothing, mlp=outs.__setitem__)
        stack.enter_context(watch)
        model(**calling_arguments(subject, tiled))
    return outs


def _written(new: Tensor, rows: Tensor | None = None) -> Any:
    """A hook that puts another value in place of a module's output (in some rows)."""

    def after(module: Any, args: tuple, output: Any) -> Any:
        value, put = unwrap(output)
        assert value is not None
        shaped = new.to(value.dtype)
        if rows is not None:
            shaped = torch.where(rows[:, None, None], shaped, value.reshape(new.shape))
        return put(shaped.reshape(value.shape))

    return after


def _entered(stream: Tensor) -> Any:
    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        value, put = main_input(args, kwargs)
        assert value is not None
        return put(stream.to(value.dtype).reshape(value.shape))

    return before
