"""Causal scrubbing: does a stated hypothesis account for the behaviour, when all that it calls unimportant is replaced?

A hypothesis is a tree of claims, each about parts of the model: *what these parts compute depends on the prompt only
through this feature*, and *it is made of these inputs*.

    previous = Claim("token before", ("a0.h3",), values=tokens_before)               one label a prompt
    copied = Claim("copied token", ("a1.h1",), values=copied, reads=(Read(previous, via=("k",)),))
    answer = Claim("answer", ("logits",), values=prompts, reads=(Read(copied),))
    told = scrub(subject, prompts, answer, metric, seed=0)                           told.recovered

Each claim's parts get, for a prompt x, what they compute when every input that the claim reads comes (scrubbed in turn)
from a random prompt which agrees with x on that input's feature, and every other input from one random prompt of all.
The share of the loss that is recovered is (scrubbed - random) / (model - random): 1 where the hypothesis keeps what
counts, 0 where answers are as good as those of other prompts.

How it can mislead: a hypothesis that says less is easier to satisfy (a claim whose feature is the whole prompt
constrains nothing), so compare recoveries of hypotheses that say as much. A recovery can be good for the wrong reason
(two errors that cancel in the mean), and above 1. Prompts stand position by position, so all have one length. A claim
that reads nothing is computed whole on the prompt that is drawn for it: its own inside is not tested.
Source: Chan et al. 2022 (Causal Scrubbing).

Steps: what every source adds for every prompt; the tree from its leaves to the logits, each claim as one run of random
prompts, whose inputs into the claim's parts take what was scrubbed below; the metric against each prompt's own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.circuit import inputs_matrix
from tomoscope.circuits.graph import LOGITS, Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.sources import Sources
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import AlignmentError, DataError, SiteError
from tomoscope.model import Subject

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Claim:
    """One node of a hypothesis.

    Attributes:
        name: what it is.
        parts: sources of the graph ("a1.h3", "m0", "embed"), or ("logits",) for the root.
        values: a label for each prompt: all that the parts' output depends on.
        reads: the claims that their inputs are; none for a claim that says nothing of its inputs.
    """

    name: str
    parts: tuple[str, ...]
    values: tuple[Hashable, ...]
    reads: tuple[Read, ...] = ()

    def __iter__(self) -> Iterator[Claim]:
        """Itself and every claim below it, each as often as it is read."""
        yield self
        for read in self.reads:
            yield from read.claim


@dataclass(frozen=True)
class Read:
    """That a claim's parts read another claim.

    Attributes:
        claim: what is read.
        via: the inputs of heads by which it is read ("q", "k", "v"); none for all of them.
    """

    claim: Claim
    via: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scrubbed:
    """What was left of the behaviour.

    Attributes:
        scrubbed: [draw, prompt] metric of the scrubbed model.
        model: [prompt] metric of the model.
        random: [draw, prompt] metric of the model's answers to other prompts.
        metric: its name.
        runs: forwards of a batch of all prompts, for each draw.
    """

    scrubbed: Float[Tensor, "draw prompt"]
    model: Float[Tensor, " prompt"]
    random: Float[Tensor, "draw prompt"]
    metric: str
    runs: int

    @property
    def recovered(self) -> float:
        """(scrubbed - random) / (model - random), of means over draws and prompts."""
        return self._of(np.ones((1, len(self.model))))[0]

    def interval(self, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of `recovered` over prompts."""
        n = len(self.model)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
        low, high = np.quantile(self._of(weights), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _of(self, weights: Float[np.ndarray, "resample prompt"]) -> list[float]:
        rows = (self.scrubbed.double().mean(0), self.model.double(), self.random.double().mean(0))
        scrubbed, model, random = (weights @ row.cpu().numpy() for row in rows)
        return ((scrubbed - random) / (model - random)).tolist()


def scrub(
    subject: Subject,
    prompts: Any,
    hypothesis: Claim,
    metric: Metric,
    *,
    graph: Graph | None = None,
    draws: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scrubbed:
    """Test a hypothesis.

    Args:
        subject: the model.
        prompts: of one length.
        hypothesis: the root, whose parts are ("logits",).
        metric: of the prompts.
        graph: of the model; `Graph.of(subject)` by default.
        draws: how often prompts are drawn anew.
        seed: of the draws.
        progress: called with draws done and in all.

    Raises:
        AlignmentError: prompts of different lengths.
        DataError: a root other than the logits, labels that are not one a prompt, a claim that reads its own parts.
        SiteError: an unknown part or input, or one that is computed after what reads it.
    """
    wiring = Wiring(subject, prompts, graph, ablation=Ablation.zero())
    if len(set(wiring.batch.lengths)) > 1:
        raise AlignmentError(
            f"The prompts have {sorted(set(wiring.batch.lengths))} tokens, so one can't stand in for another.",
            remedy="Scrub prompts of one length at a time.",
        )
    _check(wiring.graph, hypothesis, len(wiring))
    scrubber = _Scrubber(wiring, np.random.default_rng(seed))
    everyone = torch.arange(len(wiring))
    model = _metric(metric, wiring.clean_logits, everyone)
    scrubbed, random = [], []
    for draw in range(draws):
        scrubbed.append(_metric(metric, scrubber.logits(hypothesis), everyone))
        other = torch.from_numpy(scrubber.generator.integers(0, len(wiring), len(wiring)))
        random.append(_metric(metric, wiring.clean_logits[other.to(wiring.clean_logits.device)], everyone))
        if progress is not None:
            progress(draw + 1, draws)
    return Scrubbed(torch.stack(scrubbed), model, torch.stack(random), metric.name, scrubber.runs // draws)


def _metric(metric: Metric, logits: Tensor, rows: Tensor) -> Tensor:
    return metric(logits if metric.tokens is None else logits[:, metric.tokens.to(logits.device)], rows).cpu()


def _check(graph: Graph, root: Claim, n: int) -> None:
    if root.parts != (LOGITS,):
        raise DataError(
            f"The hypothesis ends in {', '.join(root.parts)}.", remedy='Its root is the claim of the parts ("logits",).'
        )
    for claim in root:
        if len(claim.values) != n:
            raise DataError(f"The claim {claim.name!r} has {len(claim.values)} labels for {n} prompts.")
        for part in claim.parts if claim is not root else ():
            graph.edge(part, LOGITS)
    for claim in root:
        columns = _columns(graph, claim.parts, ())
        if claim.reads and not columns:
            raise DataError(f"The claim {claim.name!r} is of embeddings, which read nothing.")
        for read in claim.reads:
            shared = set(read.claim.parts) & set(claim.parts)
            if shared:
                raise DataError(f"The claim {claim.name!r} reads its own part {sorted(shared)[0]}.")
            into = _columns(graph, claim.parts, read.via)
            rows = [graph.sources.index(part) for part in read.claim.parts]
            for row in rows:
                if not any(bool(graph.allowed[row, column]) for column in into):
                    by = f" by {', '.join(read.via)}" if read.via else ""
                    raise SiteError(
                        f"{graph.sources[row]} ({read.claim.name!r}) can't be read{by} in {', '.join(claim.parts)} "
                        f"({claim.name!r}): there is no such edge."
                    )


def _columns(graph: Graph, parts: Sequence[str], via: Sequence[str]) -> list[int]:
    """The destinations that are inputs of parts, by way of some of a head's inputs."""
    if tuple(parts) == (LOGITS,):
        return [len(graph.destinations) - 1]
    unknown = [one for one in via if one not in ("q", "k", "v")]
    if unknown:
        raise SiteError(f"A head has no input {unknown[0]!r}.", remedy="Its inputs are 'q', 'k' and 'v'.")
    rows = [graph.sources.index(part) for part in parts]
    found = torch.nonzero(inputs_matrix(graph)[rows].any(0))[:, 0].tolist()
    return [column for column in found if not via or graph.readers[column].input in via]


class _Scrubber:
    """Runs claims on the prompts of a wiring, whose clean sources are those of every prompt."""

    def __init__(self, wiring: Wiring, generator: np.random.Generator) -> None:
        self.wiring, self.generator, self.runs = wiring, generator, 0
        self.graph, self.ports, self.n = wiring.graph, wiring.ports, len(wiring)

    def logits(self, root: Claim) -> Float[Tensor, "prompt vocab"]:
        """Scrubbed logits of every prompt."""
        return self._run(root, torch.arange(self.n))[1] if root.reads else self.wiring.clean_logits

    def _value(self, claim: Claim, prompts: Int[Tensor, " prompt"]) -> Sources:
        """What a claim's parts add, scrubbed, for some prompts; what stands in the places of others means nothing."""
        return self._run(claim, prompts)[0] if claim.reads else self.wiring.clean.take(prompts)

    def _agreeing(self, claim: Claim, prompts: Int[Tensor, " prompt"]) -> Int[Tensor, " prompt"]:
        """For each prompt another (or itself) with the same label."""
        places: dict[Hashable, list[int]] = {}
        for row, value in enumerate(claim.values):
            places.setdefault(value, []).append(row)
        drawn = [places[claim.values[row]] for row in prompts.tolist()]
        return torch.tensor([one[self.generator.integers(len(one))] for one in drawn])

    def _run(self, claim: Claim, prompts: Int[Tensor, " prompt"]) -> tuple[Sources, Float[Tensor, "prompt vocab"]]:
        """One run in which a claim's parts have scrubbed inputs; everything else is a random prompt's."""
        other = torch.from_numpy(self.generator.integers(0, self.n, self.n))
        base = self.wiring.clean.take(other)
        added: dict[int, Tensor] = {}
        for read in claim.reads:
            value = self._value(read.claim, self._agreeing(read.claim, prompts))
            columns = _columns(self.graph, claim.parts, read.via)
            for part in read.claim.parts:
                row = self.graph.sources.index(part)
                difference = self._difference(row, value, base)
                for column in columns:
                    if self.graph.allowed[row, column]:
                        added[column] = added[column] + difference if column in added else difference
        mask = self.graph.allowed.clone()
        if claim.parts != (LOGITS,):
            # what these parts now write is for each other alone: all else goes on as on the random prompt
            own = [self.graph.sources.index(part) for part in claim.parts]
            inside = torch.zeros(len(self.graph.destinations), dtype=torch.bool)
            inside[_columns(self.graph, claim.parts, ())] = True
            mask[own] &= inside
        self.runs += 1
        drawn = [self.wiring.batch.prompts[row] for row in other.tolist()]
        there = Wiring(self.wiring.subject, drawn, ablation=Ablation.optimal(base), ports=self.ports)
        return there.rewire(mask, added=added)

    def _difference(self, row: int, value: Sources, base: Sources) -> Float[Tensor, "prompt position d_model"]:
        """What a source adds in one set of runs less what it adds in another."""
        node = self.graph.writers[row]
        if node.kind == "embed":
            return value.embed - base.embed
        if node.kind == "position":
            assert value.position is not None
            assert base.position is not None
            return value.position - base.position
        if node.kind == "head":
            port = self.ports.attention[node.layer]
            assert port is not None
            maps = self.ports.maps(self.wiring.subject, node.layer)[node.head, None]
            z = (value.heads[node.layer] - base.heads[node.layer])[:, :, node.head, None]
            return port.contributions(maps, z[None])[0, 0]
        kind = "outs" if node.kind == "mlp" else "whole"
        return getattr(value, kind)[node.layer] - getattr(base, kind)[node.layer]
