"""What an ablated source is replaced by, and the six choices with which a number about a circuit must be stamped.

    Ablation.paired(corrupted)            its value in the corrupted prompt of the same pair
    Ablation.resample(prompts)            in another prompt, drawn with a seed
    Ablation.mean(prompts)                its mean over all tokens of prompts
    Ablation.mean_by_position(prompts)    its mean at each position, counted from a prompt's first token
    Ablation.zero()                       nothing
    Ablation.optimal(constants)           a learned constant (`fit_optimal`)

How it can mislead: the same circuit gets very different faithfulness under different ablations (Miller et al. 2024,
arXiv:2407.08734, whose six choices `Choices` records). Zero and mean take the model off its distribution; a mean by
position says nothing where prompts of a task do not line up; a paired prompt ablates only what differs between the two.
Heads are averaged as z (times the scale of a norm at the branch's end), so a mean is that of the contribution.
Sources: Wang et al. 2023 (mean, resample), Chan et al. 2022 (resample), Li & Janson 2024 (optimal).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import Sources, moved, read_sources
from tomoscope.errors import AlignmentError, DataError
from tomoscope.model import Batch, Subject

KINDS = ("paired", "mean", "mean_by_position", "resample", "zero", "optimal")


@dataclass(frozen=True)
class Choices:
    """The six choices behind a number about a circuit (Miller et al. 2024).

    Attributes:
        granularity: of the graph: "heads' inputs apart", "heads", "neurons", ...
        component: what is ablated: "edges" or "nodes".
        value: what it is replaced by: an `Ablation`'s kind.
        positions: at which tokens: "all", or which.
        direction: "ablate" (corrupted values into the clean run) or "restore" (clean values into the corrupted run).
        set: what is ablated: "all but the circuit", "the circuit", "one at a time".
    """

    granularity: str = "heads (query, key and value inputs apart) and MLPs"
    component: str = "edges"
    value: str = "paired"
    positions: str = "all"
    direction: str = "ablate"
    set: str = "all but the circuit"

    def to_json(self) -> dict[str, str]:
        """As plain values for a record."""
        return asdict(self)

    def __str__(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in asdict(self).items())


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablated source is replaced by. Make it with `paired`, `mean`, `zero`, ...

    Attributes:
        kind: one of `KINDS`.
        prompts: the corrupted prompts, or those that are averaged or drawn from; a `Batch` or what `Subject.tokens`
            takes.
        constants: of "optimal".
        seed: of "resample".
    """

    kind: str
    prompts: Any = None
    constants: Sources | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"The ablation {self.kind!r} is unknown.", remedy=f"It is one of {', '.join(KINDS)}.")

    @classmethod
    def paired(cls, corrupted: Any) -> Ablation:
        """The value in the corrupted prompt of the same pair (as many tokens each)."""
        return cls("paired", corrupted)

    @classmethod
    def mean(cls, prompts: Any) -> Ablation:
        """The mean over all tokens of some prompts."""
        return cls("mean", prompts)

    @classmethod
    def mean_by_position(cls, prompts: Any) -> Ablation:
        """The mean at each position, counted from the prompts' first token."""
        return cls("mean_by_position", prompts)

    @classmethod
    def resample(cls, prompts: Any = None, *, seed: int = 0) -> Ablation:
        """The value in another prompt of as many tokens, drawn from some prompts (or from the batch itself)."""
        return cls("resample", prompts, seed=seed)

    @classmethod
    def zero(cls) -> Ablation:
        """Nothing: the source adds zero."""
        return cls("zero")

    @classmethod
    def optimal(cls, constants: Sources) -> Ablation:
        """Learned constants, the same in every prompt and position."""
        return cls("optimal", constants=constants)

    def choices(self, **given: str) -> Choices:
        """The stamp of a number that was measured with this ablation."""
        return Choices(**{"value": str(self), **given})

    def __str__(self) -> str:
        return f"resample (seed {self.seed})" if self.kind == "resample" else self.kind.replace("_", " ")

    # ---- its values

    def prepare(self, subject: Subject, batch: Batch, ports: Ports) -> Replacement:
        """What is needed to give the values for any rows of a batch: prompts drawn, means taken.

        Raises:
            AlignmentError: paired prompts of other lengths, or a prompt longer than those a mean by position was
                taken from.
            DataError: no other prompt of equal length to draw.
        """
        if self.kind == "zero":
            one = read_sources(subject, batch.take(slice(0, 1)), ports, logits=False).sources
            return Replacement(subject, ports, constants=one.map(lambda value: torch.zeros_like(value[:1, :1])))
        if self.kind == "optimal":
            if self.constants is None:
                raise DataError("An optimal ablation needs its constants.", remedy="Learn them with fit_optimal.")
            return Replacement(subject, ports, constants=self.constants)
        if self.kind == "resample":
            prompts = batch if self.prompts is None else subject.tokens(self.prompts)
            other = subject.tokens([prompts.prompts[i] for i in self._drawn(batch, prompts)])
            return Replacement(subject, ports, other=_aligned(batch, other))
        if self.prompts is None:
            raise DataError(f"The ablation {self.kind!r} needs prompts.", remedy=f"Ablation.{self.kind}(prompts).")
        other = subject.tokens(self.prompts)
        if self.kind == "paired":
            return Replacement(subject, ports, other=_aligned(batch, other))
        mean = means(subject, other, ports, by_position=self.kind == "mean_by_position")
        if self.kind == "mean":
            return Replacement(subject, ports, constants=mean)
        longest, known = max(batch.lengths), mean.embed.shape[1]
        if longest > known:
            raise AlignmentError(
                f"A prompt has {longest} tokens, but the means by position are of {known}.",
                remedy="Take the means from prompts at least as long.",
            )
        columns = (torch.arange(batch.width)[None] - batch.pads.cpu()[:, None]).clamp(0, known - 1)
        return Replacement(subject, ports, constants=mean, columns=columns)

    def _drawn(self, batch: Batch, prompts: Batch) -> list[int]:
        drawn = []
        for row, prompt in enumerate(batch.prompts):
            fitting = [
                i for i, p in enumerate(prompts.prompts) if len(p.ids) == len(prompt.ids) and p.ids != prompt.ids
            ]
            if not fitting:
                raise DataError(
                    f"No other prompt has the {len(prompt.ids)} tokens of prompt {row}, so none can take its place.",
                    remedy="Give more prompts of its length, or take a mean.",
                )
            generator = torch.Generator().manual_seed((self.seed << 20) + row)
            drawn.append(fitting[int(torch.randint(len(fitting), (), generator=generator))])
        return drawn


@dataclass(frozen=True, eq=False)
class Replacement:
    """An ablation made ready for a batch; `take` gives its values for some rows, the same however they are cut.

    Attributes:
        subject: the model.
        ports: of its graph.
        other: prompts whose values are taken, row by row, or None.
        constants: values by position or for all tokens, where no prompts are run.
        columns: [pair, position], which of the constants' positions each column takes.
    """

    subject: Subject
    ports: Ports
    other: Batch | None = None
    constants: Sources | None = None
    columns: Tensor | None = None

    def take(self, rows: slice) -> Sources:
        """The values for some rows of the batch; prompts are run for this call."""
        if self.other is not None:
            return read_sources(self.subject, self.other.take(rows), self.ports, logits=False).sources
        assert self.constants is not None
        return self.constants if self.columns is None else moved(self.constants, self.columns[rows])


def _aligned(batch: Batch, other: Batch) -> Batch:
    """The other prompts, if they stand in the same columns."""
    if len(batch) != len(other):
        raise AlignmentError(f"There are {len(batch)} prompts and {len(other)} in their place.")
    for row, (mine, theirs) in enumerate(zip(batch.lengths, other.lengths, strict=True)):
        if mine != theirs:
            raise AlignmentError(f"Pair {row} does not align: {mine} tokens against {theirs}.")
    if batch.width != other.width or bool((batch.pads != other.pads).any()):
        raise AlignmentError("The two batches are padded differently.", remedy="Encode both with the same subject.")
    return other


def means(
    subject: Subject,
    batch: Batch,
    ports: Ports,
    *,
    by_position: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Sources:
    """The mean of every source over the tokens of prompts, read piece by piece; padding counts for nothing.

    Returns:
        [1, 1, ...], or [1, position, ...] counted from the first token.
    """
    step = min(len(batch), subject.rows_per_call(max(batch.width, 1)))
    total: Sources | None = None
    count = torch.zeros(max(batch.lengths) if by_position else 1, dtype=torch.float64)
    for start in range(0, len(batch), step):
        piece = batch.take(slice(start, start + step))
        read = read_sources(subject, piece, ports, logits=False).sources
        mask = piece.mask.cpu()
        place = torch.arange(piece.width)[None] - piece.pads.cpu()[:, None]
        index = (place if by_position else torch.zeros_like(place))[mask]
        count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        sums = read.map(lambda value, mask=mask, index=index: _summed(value, mask, index, len(count)))
        total = sums if total is None else total.zip(sums, torch.add)
        if progress is not None:
            progress(min(start + step, len(batch)), len(batch))
    assert total is not None
    dtype = subject.dtype

    def divided(value: Tensor) -> Tensor:
        shaped = count.to(value.device).reshape(1, -1, *([1] * (value.dim() - 2)))
        return (value / shaped).to(dtype)

    return total.map(divided)


def _summed(value: Tensor, mask: Tensor, index: Tensor, length: int) -> Tensor:
    tokens = value[mask.to(value.device)].double()
    out = torch.zeros(length, *tokens.shape[1:], dtype=torch.float64, device=value.device)
    return out.index_add_(0, index.to(value.device), tokens)[None]
