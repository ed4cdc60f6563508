"""How each method of `edges` turns pairs into sums of scores: batches of pairs, runs, gradients, products.

Each function gives ([place, source, destination] summed over pairs, the clean metric summed over pairs), with one place
unless positions are kept apart. All read the ablated values and the clean ones first (no gradient), then make their
runs with gradients, as many rows as fit memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.scores.gradients import InputGradients, Norms, Path, Push, input_gradients
from tomoscope.circuits.scores.products import Expansion, edge_products, source_products, tile_size, tiles
from tomoscope.circuits.wiring.ablation import Ablation, Replacement
from tomoscope.circuits.wiring.ending import metric_of
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import Collected, SourceRun, Sources, read_sources
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.model import Batch, Subject
from tomoscope.model.memory import SHARE, free_bytes

Sums = tuple[Float[Tensor, "place source destination"], float]
MASK_BYTES = 1 << 25  # of the masks that exact patching builds at a time


@dataclass(frozen=True, eq=False)
class Work:
    """What is scored.

    Attributes:
        subject: the model.
        ports: of its graph.
        norms: the maps of its norms.
        batch: the clean prompts.
        ablation: what an ablated edge carries.
        metric: of the pairs.
        batch_size: pairs a batch, or None for as many as fit.
        progress: called with work done and in all.
    """

    subject: Subject
    ports: Ports
    norms: Norms
    batch: Batch
    ablation: Ablation
    metric: Metric
    batch_size: int | None = None
    progress: Callable[[int, int], None] | None = None

    @cached_property
    def replacement(self) -> Replacement:
        """The ablation made ready for all pairs."""
        return self.ablation.prepare(self.subject, self.batch, self.ports)

    def pieces(self, rows_a_pair: int, *, gradients: bool = True) -> Iterator[tuple[slice, Batch, Tensor]]:
        """(rows, prompts, row numbers) of batches such that each pair's rows fit."""
        fit = self.subject.rows_per_call(max(self.batch.width, 1), gradients=gradients)
        step = self.batch_size or max(1, fit // max(1, rows_a_pair))
        for start in range(0, len(self.batch), step):
            rows = slice(start, min(start + step, len(self.batch)))
            yield rows, self.batch.take(rows), torch.arange(len(self.batch))[rows]
            self.tell(rows.stop)

    def tell(self, done: int, total: int | None = None) -> None:
        """Report progress, in pairs unless a total is given."""
        if self.progress is not None:
            self.progress(done, total or len(self.batch))

    def zeros(self, by_position: bool) -> Tensor:
        """[place, source, destination]."""
        places = max(self.batch.lengths) if by_position else 1
        return torch.zeros(places, len(self.ports.graph.sources), len(self.ports.graph.readers), dtype=torch.float64)

    def clean_metrics(self, clean: SourceRun, numbers: Tensor) -> Float[Tensor, " pair"]:
        """The metric of the pairs of a clean run."""
        return metric_of(self.metric, clean.logits, numbers).cpu()

    def clean_metric(self, clean: SourceRun, numbers: Tensor) -> float:
        """The sum of the metric over the pairs of a clean run."""
        return float(self.clean_metrics(clean, numbers).sum())

    def gradients(self, batch: Batch, numbers: Tensor, path: Path, *, watch: Collected | None = None) -> InputGradients:
        """`input_gradients` of this work."""
        return input_gradients(self.subject, self.ports, self.norms, batch, self.metric, numbers, path, watch=watch)

    def products(self, differences: Sources, gradients: InputGradients, batch: Batch, by_position: bool) -> Tensor:
        """`products` of this work, padded to the places of all pairs."""
        found = edge_products(
            self.subject, self.ports, self.norms, differences, gradients, batch, by_position=by_position
        )
        out = self.zeros(by_position)
        out[: len(found)] = found
        return out


# ---- paths of the embeddings


def along_inputs(work: Work, shares: Sequence[float], weights: Sequence[float], by_position: bool) -> Sums:
    """Gradients of runs whose token embeddings are a mixture of clean and ablated ones.

    Args:
        work: what is scored.
        shares: [step], how much of each embedding is the clean one; (1,) is plain attribution.
        weights: [step], what each step's gradient counts.
        by_position: keep positions apart.
    """
    out, clean_total = work.zeros(by_position), 0.0
    share, plain = torch.tensor(shares, dtype=torch.float64), tuple(shares) == (1.0,)
    summed = torch.tensor(weights, dtype=torch.float64)
    for rows, batch, numbers in work.pieces(len(shares)):
        ablated = work.replacement.take(rows)
        if plain:
            collected = Collected(work.subject, work.ports, len(batch))
            gradients = work.gradients(batch, numbers, Path(1, summed), watch=collected)
            sources = collected.sources()
            clean_total += float(gradients.metric.sum())
        else:
            clean = read_sources(work.subject, batch, work.ports)
            sources = clean.sources
            clean_total += work.clean_metric(clean, numbers)
            path = Path(1, summed, embed=mixed(sources.embed, ablated.embed, share))
            gradients = work.gradients(batch, numbers, path)
        out += work.products(sources.zip(ablated, torch.sub), gradients, batch, by_position)
    return out, clean_total


def mixed(clean: Tensor, ablated: Tensor, share: Tensor) -> Tensor:
    """[step x pair, position, d_model] between ablated (0) and clean (1)."""
    step = share.to(clean)[:, None, None, None]
    return (ablated + step * (clean - ablated)).flatten(0, 1)


# ---- paths of single sources


def along_sources(work: Work, steps: int) -> Sums:
    """For each source, gradients while its output alone goes from ablated to clean (midpoints), for its own edges."""
    graph, out, clean_total = work.ports.graph, work.zeros(False), 0.0
    share = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    fit = work.subject.rows_per_call(max(work.batch.width, 1), gradients=True)
    for rows, batch, numbers in work.pieces(steps):
        clean, ablated = read_sources(work.subject, batch, work.ports), work.replacement.take(rows)
        differences = clean.sources.zip(ablated, torch.sub)
        clean_total += work.clean_metric(clean, numbers)
        together = max(1, fit // (steps * len(batch)))
        expansion = Expansion(work.subject, work.ports, differences)
        for layer in range(-1, graph.n_layers):
            mine = [row for row, writer in enumerate(graph.writers) if writer.layer == layer]
            for kind in dict.fromkeys(graph.writers[row].kind for row in mine):
                of_kind = [row for row in mine if graph.writers[row].kind == kind]
                for start in range(0, len(of_kind), together):
                    chosen = of_kind[start : start + together]
                    delta = expansion.of(layer, kind, chosen)
                    path = _alone(work, clean, layer, kind, delta, share)
                    gradients = input_gradients(work.subject, work.ports, work.norms, batch, work.metric, numbers, path)
                    out[0, chosen] += source_products(
                        work.subject, work.ports, work.norms, chosen, delta, gradients, batch.mask
                    )
    return out, clean_total


def _alone(work: Work, clean: SourceRun, layer: int, kind: str, delta: Tensor, share: Tensor) -> Path:
    """Runs from the clean stream on in which each group's source lacks a share of its difference."""
    lacking = (share.to(delta) - 1)[None, :, None, None, None] * delta[:, None]  # group, step, pair, position, d_model
    lacking = lacking.flatten(0, 2)
    groups, weights = len(delta), torch.full(share.shape, 1 / len(share), dtype=torch.float64)
    repeats = len(lacking) // len(clean.logits)
    port = work.ports.attention[layer] if layer >= 0 else None
    if kind in ("head", "attention") and port is not None and not work.subject.structure.blocks[layer].parallel:
        # the layer's own MLP reads it too, so it is changed where it is written
        push: Push = lambda value: value + lacking.reshape(value.shape)  # noqa: E731
        stream = clean.streams[layer].repeat(repeats, 1, 1)
        return Path(groups, weights, layer, stream, pushes={port.writer: (port.factor, push)})
    stream = clean.streams[layer + 1].repeat(repeats, 1, 1) + lacking
    return Path(groups, weights, layer + 1, stream)


def along_layers_added(work: Work, steps: int, by_position: bool) -> Sums:
    """As the public EAP-IG code does it: the embedding, each layer's heads together and each MLP go from ablated to
    clean in turn, held constant, and every edge gets the mean gradient over all of these runs.
    """
    out, clean_total = work.zeros(by_position), 0.0
    share = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    ports = work.ports
    places = [(layer, kind) for layer in range(ports.graph.n_layers) for kind in ("attention", "mlp")]
    places = [place for place in places if getattr(ports, place[1])[place[0]] is not None]
    weights = torch.full((steps,), 1 / (steps * (len(places) + 1)), dtype=torch.float64)
    for rows, batch, numbers in work.pieces(steps):
        clean, ablated = read_sources(work.subject, batch, ports), work.replacement.take(rows)
        differences = clean.sources.zip(ablated, torch.sub)
        clean_total += work.clean_metric(clean, numbers)
        expansion = Expansion(work.subject, ports, differences)
        paths = [Path(1, weights, embed=mixed(clean.sources.embed, ablated.embed, share))]
        for layer, kind in places:
            port = getattr(ports, kind)[layer]
            mine = [port.row] if kind == "mlp" else list(port.writers)
            named = ports.graph.writers[mine[0]].kind
            delta = expansion.of(layer, named, mine).sum(0)
            paths.append(Path(1, weights, pushes={port.writer: (port.factor, _held(delta, share))}))
        for path in paths:
            gradients = work.gradients(batch, numbers, path)
            out += work.products(differences, gradients, batch, by_position)
    return out, clean_total


def _held(delta: Tensor, share: Tensor) -> Push:
    lacking = ((share.to(delta) - 1)[:, None, None, None] * delta).flatten(0, 1)
    return lambda value: value.detach() + lacking.reshape(value.shape)


# ---- exact


def exact(work: Work) -> Sums:
    """Every edge ablated alone, as rows of rewired runs."""
    graph, out, clean_total = work.ports.graph, work.zeros(False), 0.0
    edges = torch.nonzero(graph.allowed.T)[:, [1, 0]]  # by destination, so that a call's rows start at one layer
    step = max(1, MASK_BYTES // graph.allowed.numel())
    sub = work.subject
    kept = graph.n_layers * max(work.batch.width, 1) * (sub.facts.d_model or 1) * 16 * max(4, sub.dtype.itemsize)
    most = max(1, int(free_bytes(sub.device) * SHARE) // kept)
    size = min(work.batch_size or most, most)
    total, done = len(work.batch) * len(edges), 0
    for start in range(0, len(work.batch), size):
        rows = slice(start, min(start + size, len(work.batch)))
        batch, numbers = work.batch.take(rows), torch.arange(len(work.batch))[rows]
        wiring = Wiring(
            sub, batch, ablation=work.ablation, ports=work.ports, ablated=work.replacement.take(rows), numbers=numbers
        )
        clean = wiring.clean_metric(work.metric)
        clean_total += float(clean.sum())
        for chunk in edges.split(step):
            masks = torch.ones(len(chunk), *graph.allowed.shape, dtype=torch.bool)
            masks[torch.arange(len(chunk)), chunk[:, 0], chunk[:, 1]] = False
            lost = clean.double().sum() - wiring.run(masks, work.metric).double().sum(1)
            out[0, chunk[:, 0], chunk[:, 1]] += lost
            done += len(chunk) * len(batch)
            work.tell(done, total)
    return out, clean_total


# ---- information flow


@torch.no_grad()
def flow(work: Work, by_position: bool) -> Sums:
    """For each destination, the shares of the sources in its stream by nearness: max(0, |x|_1 - |x - source|_1).

    The mean over a prompt's tokens (their sum, by position, over the prompt's length).
    """
    graph, out = work.ports.graph, work.zeros(by_position)
    for _, batch, _ in work.pieces(4, gradients=False):
        run = read_sources(work.subject, batch, work.ports, middles=True)
        lengths = torch.tensor(batch.lengths, dtype=torch.float64, device=work.subject.device)
        size, expansion = tile_size(work.subject, len(graph.sources)), Expansion(work.subject, work.ports, run.sources)
        streams = _streams_read(work.ports, run)
        for place, chosen in tiles(batch, size, by_position=by_position):
            tokens = chosen.to(work.subject.device)
            sources = expansion.tokens(tokens)
            counts = 1 / lengths[tokens // batch.width]
            for moment, stream in streams.items():
                before = sum(writer.moment < moment for writer in graph.writers)
                x = stream.flatten(0, 1)[tokens].to(sources.dtype)
                gap = torch.cdist(sources[:before].transpose(0, 1), x[:, None], p=1)[..., 0]  # token, source
                near = (x.abs().sum(-1, keepdim=True) - gap).clamp(min=0)
                shares = (near / near.sum(1, keepdim=True)).nan_to_num().double()
                columns = [i for i, reader in enumerate(graph.readers) if reader.moment == moment]
                found = (shares * counts[:, None]).sum(0).cpu()
                out[place, :before, columns] += found[:, None].expand(-1, len(columns))
    return out, float("nan")


def _streams_read(ports: Ports, run: SourceRun) -> dict[int, Tensor]:
    """Moment -> the stream that its destinations read."""
    out: dict[int, Tensor] = {}
    for reader in ports.graph.readers:
        if reader.kind == "mlp" and reader.layer in run.middles:
            out[reader.moment] = run.middles[reader.layer]
        else:
            out.setdefault(reader.moment, run.streams[reader.layer])
    return out
