"""Which nodes matter: the effect of ablating all that a head, an MLP or the embedding writes, exactly or estimated.

    scores = node_scores(subject, pairs)                       attribution along the embeddings' path
    scores = node_scores(subject, pairs, method="exact")       one row of a batch a node
    neurons = neuron_scores(subject, pairs)                    the same for every MLP neuron

A score is the metric of the clean run less the metric with that node alone ablated (mean over pairs), or its estimate:
(clean - ablated output) . gradient there. A node's estimate is the sum of its edges' (the stream is read by the
destinations alone), so this is the cheap way where edges are not asked for. Methods are those of `edges`.

How it can mislead: as for edges; and a node's parts can cancel, so that it scores near zero while its edges do not.

Sources: Nanda 2023 and Syed et al. 2023 (attribution patching); Hanna et al. 2024 (paths); Mueller et al. 2025 (MIB,
the node level).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.graph import Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs, encode_pairs
from tomoscope.circuits.scores.gradients import Norms, Path, start
from tomoscope.circuits.scores.methods import Work, along_sources, mixed
from tomoscope.circuits.scores.products import Expansion, precision_of, tile_size, tiles
from tomoscope.circuits.wiring.ablation import Ablation, Choices
from tomoscope.circuits.wiring.ending import calling_arguments, last_logits, metric_of, unembedding
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import SourceRun, read_sources
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError
from tomoscope.model import Batch, Subject
from tomoscope.model.gradients import frozen
from tomoscope.model.probe import main_input, unwrap

Method = Literal["exact", "EAP", "EAP-IG-inputs", "EAP-IG-activations", "clean-corrupted"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class NodeScores:
    """A score for every source of a graph.

    Attributes:
        graph: whose sources.
        scores: [source], mean over pairs of the metric that is lost without the node (or its estimate).
        method: as for edges.
        metric: the metric's name.
        choices: the six choices of the ablation.
        n: pairs.
        steps: of the path, for methods that have one.
        by_position: [source, position] (counted from a prompt's first token), if asked for; sums to `scores`.
        coordinates: [source, d_model], each coordinate's share, if asked for; sums to `scores`.
    """

    graph: Graph
    scores: Float[Tensor, " source"]
    method: str
    metric: str
    choices: Choices
    n: int
    steps: int = 1
    by_position: Float[Tensor, "source position"] | None = None
    coordinates: Float[Tensor, "source d_model"] | None = None

    def __getitem__(self, node: str) -> float:
        """The score of a source by its name."""
        if node not in self.graph.sources:
            raise DataError(f"There is no source {node!r} in the graph.", remedy="See Graph.sources.")
        return float(self.scores[self.graph.sources.index(node)])

    def ranked(self) -> list[tuple[str, float]]:
        """(source, score), largest size first."""
        order = self.scores.abs().argsort(descending=True, stable=True).tolist()
        return [(self.graph.sources[i], float(self.scores[i])) for i in order]

    def __repr__(self) -> str:
        return f"NodeScores({self.method} of {self.metric}, {len(self.scores)} nodes, {self.n} pairs)"


def node_scores(
    subject: Subject,
    pairs: Any,
    *,
    method: Method = "EAP-IG-inputs",
    graph: Graph | None = None,
    metric: Metric | None = None,
    ablation: Ablation | None = None,
    steps: int = 5,
    by_position: bool = False,
    coordinates: bool = False,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NodeScores:
    """Score every node of a model.

    Args:
        subject: the model.
        pairs: a `data.PairSet`, or `Pairs`; streamed through in batches that fit memory.
        method: see `edges`; "EAP" is plain attribution patching.
        graph: `Graph.of(subject)` by default.
        metric: of the pairs; their logit difference by default.
        ablation: what an ablated node writes; what it does in the corrupted prompt by default.
        steps: of the path; for "EAP-IG-inputs" the shares of the clean embedding are 1/steps, ..., 1 (for edges the
            public code starts at the ablated end instead; so do they).
        by_position: also keep positions apart (not for "exact" and "EAP-IG-activations").
        coordinates: also keep the coordinates of what is written apart (likewise).
        batch_size: pairs a batch; as many as fit by default.
        progress: called with work done and in all.

    Raises:
        DataError: an unknown method, or positions or coordinates asked of one that has none.
    """
    if method not in METHODS:
        raise DataError(f"The method {method!r} is unknown.", remedy=f"It is one of {', '.join(METHODS)}.")
    if (by_position or coordinates) and method in ("exact", "EAP-IG-activations"):
        raise DataError(f"{method!r} gives no scores by position or coordinate.", remedy="Take EAP or EAP-IG-inputs.")
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    ablation = ablation or Ablation.paired(made.corrupted)
    metric, ports = metric or made.metric(), Ports.of(subject, graph)
    work = Work(subject, ports, Norms(subject), made.clean, ablation, metric, batch_size, progress)
    place, coordinate = None, None
    if method == "exact":
        total = _exact(work)
    elif method == "EAP-IG-activations":
        total = along_sources(work, steps)[0].sum((0, 2))
    else:
        shares = {"EAP": [1.0], "clean-corrupted": [1.0, 0.0]}.get(method, [k / steps for k in range(1, steps + 1)])
        place, coordinate = _along_inputs(work, shares, by_position)
        total = place.sum(1)
    n = len(made)
    return NodeScores(
        ports.graph,
        total / n,
        method,
        metric.name,
        ablation.choices(component="nodes", set="one node at a time"),
        n,
        steps if "IG" in method else 1,
        place / n if by_position and place is not None else None,
        coordinate / n if coordinates and coordinate is not None else None,
    )


def neuron_scores(
    subject: Subject,
    pairs: Any,
    *,
    metric: Metric | None = None,
    ablation: Ablation | None = None,
) -> Float[Tensor, "layer neuron"]:
    """Attribution of every MLP neuron: (clean - ablated activation) . gradient, summed over tokens, mean over pairs.

    Args:
        subject: the model.
        pairs: a `data.PairSet`, or `Pairs`.
        metric: of the pairs; their logit difference by default.
        ablation: `Ablation.paired` (by default), `mean` or `zero`.

    Returns:
        NaN for layers whose MLP has no one hidden layer (mixtures of experts).

    Raises:
        UnavailableSiteError: no layer has hidden neurons.
        DataError: another kind of ablation.
    """
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    metric, ablation = metric or made.metric(), ablation or Ablation.paired(made.corrupted)
    sites = [site.name for site in subject.resolve("layer.*.mlp.post")]

    def value(logits: Tensor, batch: Batch) -> Tensor:
        last = logits[torch.arange(len(batch)), batch.last.to(logits.device)]
        return metric(last if metric.tokens is None else last[:, metric.tokens.to(last.device)], batch.indices)

    found = subject.gradients(made.clean, value, sites)
    if ablation.kind not in ("paired", "mean", "zero"):
        raise DataError(f"Neurons have no {ablation} ablation.", remedy="Take paired, mean or zero.")
    prompts = None if ablation.kind == "zero" else subject.tokens(ablation.prompts)
    other = None if prompts is None else subject.read(prompts, *sites)
    out = torch.full((subject.facts.n_layers, subject.facts.d_mlp or 0), torch.nan, dtype=torch.float64)
    for site in sites:
        own, ablated = found.values[site].double(), torch.zeros(())
        if other is not None and prompts is not None:
            ablated = other[site].double()
            ablated = ablated[prompts.mask.cpu()].mean(0) if ablation.kind == "mean" else ablated
        product = (own - ablated) * found.gradients[site].double()
        product[~made.clean.mask.cpu()] = 0.0
        out[int(site.split(".")[1])] = product.sum((0, 1)) / len(made)
    return out


def _exact(work: Work) -> Float[Tensor, " source"]:
    """Every node ablated alone towards all its readers, as rows of rewired runs."""
    graph = work.ports.graph
    masks = torch.ones(len(graph.sources), *graph.allowed.shape, dtype=torch.bool)
    masks[torch.arange(len(masks)), torch.arange(len(masks))] = False
    total = torch.zeros(len(masks), dtype=torch.float64)
    for rows, batch, numbers in work.pieces(1, gradients=False):
        ablated = work.replacement.take(rows)
        wiring = Wiring(work.subject, batch, ablation=work.ablation, ports=work.ports, ablated=ablated, numbers=numbers)
        clean = wiring.clean_metric(work.metric).double().sum()
        total += clean - wiring.run(masks, work.metric).double().sum(1)
    return total


def _along_inputs(work: Work, shares: Sequence[float], by_position: bool) -> tuple[Tensor, Tensor]:
    """([source, place], [source, d_model]) summed over pairs."""
    graph, subject, ports = work.ports.graph, work.subject, work.ports
    places = max(work.batch.lengths) if by_position else 1
    place_sums = torch.zeros(len(graph.sources), places, dtype=torch.float64)
    coordinates = torch.zeros(len(graph.sources), subject.facts.d_model or 1, dtype=torch.float64)
    share = torch.tensor(shares, dtype=torch.float64)
    for rows, batch, numbers in work.pieces(len(shares)):
        clean, ablated = read_sources(subject, batch, ports), work.replacement.take(rows)
        path = Path(1, torch.full(share.shape, 1 / len(share), dtype=torch.float64))
        if tuple(shares) != (1.0,):
            path = Path(1, path.weights, embed=mixed(clean.sources.embed, ablated.embed, share))
        written = write_gradients(work, batch, numbers, path, clean)
        expansion = Expansion(subject, ports, clean.sources.zip(ablated, torch.sub))
        for place, chosen in tiles(batch, tile_size(subject, 2 * len(graph.sources)), by_position=by_position):
            tokens = chosen.to(subject.device)
            product = expansion.tokens(tokens)
            for row, writer in enumerate(graph.writers):
                product[row] *= written[max(writer.layer, -1), writer.kind].flatten(0, 1)[tokens]
            place_sums[:, place] += product.sum((1, 2)).double().cpu()
            coordinates += product.sum(1).double().cpu()
    return place_sums, coordinates


def write_gradients(
    work: Work, batch: Batch, numbers: Tensor, path: Path, clean: SourceRun
) -> dict[tuple[int, str], Float[Tensor, "pair position d_model"]]:
    """(layer, kind) -> the gradient of the metric at what is added to the stream there, summed over a path's steps.

    Args:
        work: the model and the metric.
        batch: the pairs' prompts.
        numbers: which of the metric's pairs they are.
        path: the runs.
        clean: the clean run of the prompts (for the stream's shape).
    """
    subject, ports, steps = work.subject, work.ports, len(path.weights)
    repeated = torch.arange(len(batch)).repeat(steps)
    tiled, kept = batch.take(repeated), {}
    narrow = unembedding(subject, work.metric.tokens)
    with torch.enable_grad(), frozen(subject.model), narrow, ExitStack() as stack:
        start(subject, ports, path, stack)
        for key, module, factor in _writers(subject, ports):
            stack.callback(module.register_forward_hook(_keeper(kept, key, factor)).remove)
        block = subject.model.get_submodule(subject.structure.blocks[0].path)
        stack.callback(block.register_forward_pre_hook(_start_keeper(kept), with_kwargs=True).remove)
        logits = last_logits(subject.model(**calling_arguments(subject, tiled)), tiled)
        values = metric_of(work.metric, logits, numbers[repeated])
        tensors = [value for value, _ in kept.values()]
        found = torch.autograd.grad(values.sum(), tensors, allow_unused=True)
    precision, shape = precision_of(subject), (steps, *clean.streams[0].shape)
    weights = path.weights.to(subject.device, precision)
    out = {}
    for (key, (value, factor)), grad in zip(kept.items(), found, strict=True):
        whole = torch.zeros_like(value) if grad is None else grad / factor
        out[key] = torch.einsum("sptd,s->ptd", whole.reshape(shape).to(precision), weights)
    out[-1, "position"] = out[-1, "embed"]
    return out


def _writers(subject: Subject, ports: Ports) -> Iterable[tuple[tuple[int, str], Any, float]]:
    for layer in range(ports.graph.n_layers):
        attention, mlp = ports.attention[layer], ports.mlp[layer]
        if attention is not None:
            kind = "head" if attention.projection else "attention"
            yield (layer, kind), subject.model.get_submodule(attention.writer), attention.factor
        if mlp is not None:
            yield (layer, "mlp"), subject.model.get_submodule(mlp.writer), mlp.factor


def _keeper(kept: dict, key: tuple[int, str], factor: float) -> Any:
    def after(module: Any, args: tuple, output: Any) -> Any:
        value, put = unwrap(output)
        assert value is not None
        kept[key] = value, factor
        return put(value.clone())  # what follows may change it in place

    return after


def _start_keeper(kept: dict) -> Any:
    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        value, put = main_input(args, kwargs)
        assert value is not None
        kept[-1, "embed"] = value, 1.0
        return put(value.clone())

    return before
