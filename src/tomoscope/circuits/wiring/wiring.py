"""The model with every destination given its own input: run any subset of edges, the rest ablated.

    wiring = Wiring(subject, clean, graph, ablation=Ablation.paired(corrupted))
    wiring.run(masks, metric)       [mask, pair]: the metric with the edges of each mask kept
    wiring.logits(mask)             [pair, vocab] at the last token; has a gradient where the mask asks for one

    input of destination n = stream of this run + sum over sources s of (1 - mask[s, n]) (ablated s - this run's s)

A mask is 1 where the edge carries what the source computes in this run (which may itself have changed), 0 where it
carries the ablated value, and anything between for a learned mask. Head inputs are apart: the block's own norm on each
input, then that head's slice of the model's own projection; rotary, attention, MLP and the model's end are the model's
own, so a mask of ones gives its own logits and, with paired prompts, a mask of zeros the corrupted run's.

How it can mislead: what is no source (biases, learned positions) is never ablated; a norm belongs to the destination,
so ablating one edge changes the scale at which the others are read.

Steps, with masks x prompts as the rows of one batch: start at the lowest layer that a mask changes, with the clean
stream; at each layer mix the differences of the sources so far into the inputs that miss any (one product for those
below the start, which all masks share, and one for those above); norm; project by slices; let the model go on; expand
the differences of what was just written. Memory: the differences of the sources that any mask of the call misses, by
rows; rows are as many as fit.

Sources: Conmy et al. 2023 (arXiv:2304.14997) and Hanna et al. 2024 (arXiv:2403.17806) for the semantics of an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.circuits.graph import Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.ending import calling_arguments, last_logits, metric_of, unembedding
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.rewired import Rewired
from tomoscope.circuits.wiring.sources import Sources, Watch, cat, read_sources
from tomoscope.errors import DataError
from tomoscope.model import Batch, Subject
from tomoscope.model.bypass import bypassing
from tomoscope.model.gradients import frozen
from tomoscope.model.memory import MOST_TOKENS, SHARE, free_bytes, row_bytes

Progress = Callable[[int, int], None]


class Wiring:
    """See the module's docstring.

    Args:
        subject: the model.
        prompts: whose run is rewired (as for `Subject.tokens`).
        graph: of the model; `Graph.of(subject)` by default.
        ablation: what an absent edge carries.
        ports: of the graph, where they are known already.
        ablated: the ablation's values for these prompts, where they are known already.
        numbers: which of a metric's pairs the prompts are, where they are not all of them.

    Attributes:
        clean: what each source adds in the run without ablation.
        ablated: what it is replaced by.
        clean_logits: [pair, vocab] at each prompt's last token.
    """

    def __init__(
        self,
        subject: Subject,
        prompts: object,
        graph: Graph | None = None,
        *,
        ablation: Ablation,
        ports: Ports | None = None,
        ablated: Sources | None = None,
        numbers: Int[Tensor, " pair"] | None = None,
    ) -> None:
        self.subject, self.ablation = subject, ablation
        self.batch: Batch = subject.tokens(prompts)  # ty: ignore[invalid-argument-type]
        self.ports = ports or Ports.of(subject, graph)
        self.graph = self.ports.graph
        run = read_sources(subject, self.batch, self.ports)
        self.clean, self.streams, self.clean_logits = run.sources, run.streams, run.logits
        self.ablated = ablated or ablation.prepare(subject, self.batch, self.ports).take(slice(None))
        self.numbers = torch.arange(len(self.batch)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.batch)

    # ---- the two ways to run

    @torch.no_grad()
    def run(self, masks: Tensor, metric: Metric, *, progress: Progress | None = None) -> Float[Tensor, "mask pair"]:
        """The metric of each pair with the edges of each mask kept and all others ablated.

        Args:
            masks: [mask, source, destination], bool or float; entries of edges that can't be are not looked at.
            metric: of this wiring's pairs.
            progress: called with rows done and in all.
        """
        absent = self._absent(masks)
        starts = self._starts(absent)
        out = torch.empty(
            len(masks), len(self), dtype=torch.float64 if self.subject.dtype == torch.float64 else torch.float32
        )
        order, done = starts.argsort(stable=True), 0
        for pairs, step in self._pieces(absent):
            rewired = Rewired(self, pairs, _ever(absent))
            rows, numbers = torch.arange(len(self))[pairs], self.numbers[pairs]
            for chunk in order.split(step):
                part = absent[chunk]
                with unembedding(self.subject, metric.tokens):
                    logits = self._logits(rewired, part, int(starts[chunk[0]]))
                values = metric_of(metric, logits, numbers.repeat(len(chunk)))
                out[chunk[:, None], rows[None]] = values.reshape(len(chunk), -1).to(out)
                done += len(chunk) * len(rows)
                if progress is not None:
                    progress(done, len(masks) * len(self))
        return out

    def clean_metric(self, metric: Metric) -> Float[Tensor, " pair"]:
        """The metric of each pair with no edge ablated."""
        return metric_of(metric, self.clean_logits, self.numbers).cpu()

    def logits(self, masks: Tensor) -> Float[Tensor, "*mask pair vocab"]:
        """Logits at the last token with the edges of a mask kept.

        The result has a gradient where the mask (or an ablation's constants) requires one and gradients are on; then
        all pairs are run at once, so give as many as fit.

        Args:
            masks: [source, destination], or [mask, source, destination].
        """
        many = masks if masks.dim() == 3 else masks[None]
        constants = any(value.requires_grad for value in self.ablated.tensors())
        if torch.is_grad_enabled() and (masks.requires_grad or constants):
            absent = self._absent(many)
            with frozen(self.subject.model):
                rewired = Rewired(self, slice(None), torch.ones_like(_ever(absent)))
                out = self._logits(rewired, absent, 0).reshape(len(many), len(self), -1)
            return out if masks.dim() == 3 else out[0]
        with torch.no_grad():
            absent = self._absent(many)
            starts, parts = self._starts(absent), []
            for pairs, step in self._pieces(absent):
                rewired = Rewired(self, pairs, _ever(absent))
                found = [
                    self._logits(rewired, absent[chunk], int(starts[chunk].min())).reshape(len(chunk), -1, self._vocab)
                    for chunk in torch.arange(len(many)).split(step)
                ]
                parts.append(torch.cat(found))
            out = torch.cat(parts, dim=1)
        return out if masks.dim() == 3 else out[0]

    @torch.no_grad()
    def rewire(
        self,
        mask: Tensor,
        *,
        added: Mapping[int, Float[Tensor, "pair position d_model"]] | None = None,
    ) -> tuple[Sources, Float[Tensor, "pair vocab"]]:
        """What every source adds, and the logits at the last token, with the edges of one mask kept.

        Args:
            mask: [source, destination].
            added: column of a destination -> what is added to its input besides.
        """
        absent = self._absent(mask[None])
        sources, logits = [], []
        for pairs, _ in self._pieces(absent):
            rewired = Rewired(self, pairs, _ever(absent), added)
            parts: dict[str, dict[int, Tensor]] = {"heads": {}, "outs": {}, "whole": {}}
            watch = Watch(
                self.subject, self.ports, first=0, rows=rewired.count, heads=parts["heads"].__setitem__,
                whole=parts["whole"].__setitem__, mlp=parts["outs"].__setitem__,
            )  # fmt: skip
            with watch:
                logits.append(self._logits(rewired, absent, 0))
            clean = self.clean.take(pairs)
            seen = Sources(clean.embed, clean.position, parts["heads"], parts["outs"], parts["whole"])
            sources.append(seen.map(lambda value: value.clone()))
        return cat(sources), torch.cat(logits)

    @property
    def _vocab(self) -> int:
        return self.clean_logits.shape[-1]

    # ---- the plan

    def _absent(self, masks: Tensor) -> Float[Tensor, "mask source destination"]:
        """How far each edge is missing, 0 to 1; 0 where there can be none."""
        shape = (len(self.graph.sources), len(self.graph.destinations))
        if masks.dim() != 3 or tuple(masks.shape[1:]) != shape:
            raise DataError(
                f"Masks here are [mask, {shape[0]} sources, {shape[1]} destinations], not {tuple(masks.shape)}.",
                remedy="Make them with Graph.mask or a circuit.",
            )
        allowed = self.graph.allowed.to(masks.device)
        return ((1.0 - masks.to(self.subject.dtype)) * allowed).to(self.subject.device)

    def _starts(self, absent: Tensor) -> Tensor:
        """[mask], the lowest layer whose input a mask changes; the number of layers where only the logits' does."""
        layers = torch.tensor([reader.layer for reader in self.graph.readers])
        changed = (absent.detach() != 0).any(1).cpu()
        return torch.where(changed, layers[None], torch.full_like(layers, self.graph.n_layers)[None]).min(1).values

    def _pieces(self, absent: Tensor) -> list[tuple[slice, int]]:
        """(pairs, masks a call) such that what a call keeps fits memory."""
        subject, width = self.subject, max(self.batch.width, 1)
        size = max(4, subject.dtype.itemsize) * width * (subject.facts.d_model or 1)
        sources = int(_ever(absent).sum())
        readers = max((int(self._inputs(layer, absent)) for layer in range(self.graph.n_layers)), default=0)
        per_row = row_bytes(subject.widths, width, (), itemsize=max(4, subject.dtype.itemsize), gradients=False)
        per_row += size * (2 * sources + 5 * (readers + 1))
        rows = max(1, min(int(free_bytes(subject.device) * SHARE) // per_row, MOST_TOKENS // width))
        pairs = min(len(self), rows)
        step = max(1, rows // pairs)
        return [(slice(i, min(i + pairs, len(self))), step) for i in range(0, len(self), pairs)]

    def _inputs(self, layer: int, absent: Tensor) -> int:
        port = self.ports.attention[layer]
        if port is None:
            return 1
        columns = torch.tensor(port.readers, device=absent.device)
        return int((absent.detach()[:, :, columns] != 0).any(1).sum(1).max())

    # ---- one call

    def _logits(self, rewired: Rewired, absent: Tensor, start: int) -> Float[Tensor, "row vocab"]:
        """[mask x pair, vocab] of some masks, from a layer on."""
        count, pairs, subject = len(absent), rewired.pairs, self.subject
        n_layers = self.graph.n_layers
        rows = torch.arange(len(self))[pairs].repeat(count)
        batch = self.batch.take(rows)
        stream = self.streams[start][pairs].repeat(count, 1, 1)
        skipped: dict[int, Tensor | None] = dict.fromkeys(range(start))
        if start == n_layers:
            # the last block hands on what the model's end reads
            skipped[n_layers - 1] = rewired.final(stream, absent)
        with ExitStack() as stack:
            stack.enter_context(bypassing(subject, skipped))
            if start < n_layers:
                stack.enter_context(rewired.hooked(absent, start, stream))
            output = subject.model(**calling_arguments(subject, batch))
        return last_logits(output, batch)


def _ever(absent: Tensor) -> Bool[Tensor, " source"]:
    """Which sources any mask misses."""
    return (absent.detach() != 0).any(0).any(-1).cpu()
