"""Interchange interventions with an aligned causal variable: distributed alignment search (DAS).

A causal variable of a task is said to stand in a subspace of some site. If it does, then giving the *base* prompt the
*source* prompt's value there, and there alone, must give the answer that the causal model gives for that exchange:

    trials = Interchanges(base, source, answers, wrong)             answers: what the causal model says
    alignment = align(subject, trials[half], site="layer.3.resid_post", at="last", width=1)
    accuracy = interchange_accuracy(subject, trials[other], alignment)          [trial] right or not

How it can mislead: a rotation is learned, so it can find a subspace that *makes* the answer without the model ever
using it (the interpretability illusion of Makelov et al. 2023), more easily the wider it is; a full-width exchange
works wherever all information passes. So accuracy is measured on trials that the rotation was not learned on, and
beside two controls: random subspaces of the same width, and a rotation learned in the same way on an untrained model.
Sources: Geiger et al. 2021 (interchange), 2023 (DAS, arXiv:2303.02536), Wu et al. 2023.

Steps: read the source's and the base's value at the site; exchange their coordinates in the subspace; run the base with
the mixed value; learn the rotation (an orthonormal basis by QR, Adam, cross-entropy of the right answer against the
wrong ones); measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.circuits.patching.activation import Pairs
from tomoscope.errors import AlignmentError, DataError, SiteError
from tomoscope.model import Batch, Edit, Site, Subject
from tomoscope.model.edits import At
from tomoscope.model.gradients import frozen
from tomoscope.model.regions import Bound

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Interchanges:
    """Trials: base and source prompts, and what the causal model answers after the exchange.

    Attributes:
        base: the prompts that are run.
        source: the prompts whose value is put in.
        answers: [trial, answer] token ids that are right after the exchange, -1 where a trial has fewer.
        wrong: [trial, answer] ids of the other candidates, likewise.
    """

    base: Batch
    source: Batch
    answers: Int[Tensor, "trial answer"]
    wrong: Int[Tensor, "trial wrong"]

    def __post_init__(self) -> None:
        if not len(self.base) == len(self.source) == len(self.answers) == len(self.wrong):
            raise AlignmentError(
                f"There are {len(self.base)} base prompts, {len(self.source)} sources, {len(self.answers)} answers and "
                f"{len(self.wrong)} wrong ones."
            )
        for name, ids in (("answers", self.answers), ("wrong answers", self.wrong)):
            if ids.dim() != 2 or bool((ids < 0).all(1).any()):
                raise DataError(f"Each trial needs {name}: token ids [trial, answer].")

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> Interchanges:
        """The exchange of the whole answer: into the corrupted prompt from the clean one, whose answer is right."""
        return cls(pairs.corrupted, pairs.clean, pairs.answers, pairs.wrong)

    def __len__(self) -> int:
        return len(self.base)

    def take(self, rows: Int[Tensor, " row"]) -> Interchanges:
        """Some trials."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        return Interchanges(_taken(self.base, rows), _taken(self.source, rows), self.answers[rows], self.wrong[rows])


def _taken(batch: Batch, rows: Tensor) -> Batch:
    """Some rows as a batch of its own, counted anew."""
    piece = batch.take(rows)
    return Batch(piece.input_ids, piece.attention_mask, piece.prompts, piece.pads, piece.extra)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a causal variable is said to stand.

    Attributes:
        basis: [width, d], orthonormal rows: the subspace of the site's last axis (all heads' together for "attn.z").
        site: the site.
        at: the positions, as in `Subject.read`; the exchange is made at all of them.
        losses: [step] of the learning; empty where it was not learned.
        how: how it was made.
    """

    basis: Float[Tensor, "width d"]
    site: str
    at: At = "last"
    losses: tuple[float, ...] = ()
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Dimensions of the subspace."""
        return len(self.basis)

    def mixed(self, base: Float[Tensor, "*rows d"], source: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The base's value with the source's coordinates in the subspace."""
        basis = self.basis.to(base)
        return base + ((source - base) @ basis.T) @ basis


def random_alignment(subject: Subject, site: str, *, width: int, seed: int, at: At = "last") -> Alignment:
    """A subspace drawn uniformly: the control for a learned one of the same width."""
    d = _size(subject, site)
    _check_width(width, d)
    free = torch.randn(d, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Alignment(_orthonormal(free), site, at, how={"method": "random", "seed": seed, "width": width})


def align(
    subject: Subject,
    trials: Interchanges,
    *,
    site: str,
    width: int,
    at: At = "last",
    steps: int = 200,
    batch_size: int = 32,
    rate: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Alignment:
    """Learn the subspace whose exchange gives the causal model's answers (DAS).

    Args:
        subject: the model; its weights are not changed.
        trials: to learn on; measure on others.
        site: a stream, a branch's output or "attn.z", of one layer.
        width: dimensions of the subspace.
        at: positions, the same for base and source.
        steps: of Adam; the rate falls linearly to 0.
        batch_size: trials a step.
        rate: of learning.
        seed: of the first basis and of the order of trials.
        progress: called with steps done and in all.
    """
    d = _size(subject, site)
    _check_width(width, d)
    generator = torch.Generator().manual_seed(seed)
    precise = torch.float64 if subject.dtype == torch.float64 else torch.float32
    # of length 1, so that the rate means the same in every width of stream
    free = torch.linalg.qr(torch.randn(d, width, generator=generator, dtype=torch.float64)).Q
    free = free.to(subject.device, precise).requires_grad_(True)
    base, source = (_values(subject, batch, site, at) for batch in (trials.base, trials.source))
    optimiser = torch.optim.Adam([free], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    losses, order = [], torch.zeros(0, dtype=torch.long)
    for step in range(steps):
        while len(order) < min(batch_size, len(trials)):
            order = torch.cat([order, torch.randperm(len(trials), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        alignment = Alignment(_orthonormal(free), site, at)
        with torch.enable_grad(), frozen(subject.model):
            mixed = alignment.mixed(base[rows].to(precise), source[rows].to(precise))
            logits = _run(subject, _taken(trials.base, rows), site, at, mixed)
            loss = _loss(logits, trials.answers[rows], trials.wrong[rows]).mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, steps)
    how = {
        "method": "DAS", "seed": seed, "width": width, "steps": steps, "batch": batch_size, "rate": rate,
        "trials": len(trials),
    }  # fmt: skip
    return Alignment(_orthonormal(free.detach()).cpu(), site, at, tuple(losses), how)


@torch.no_grad()
def interchange_logits(
    subject: Subject, trials: Interchanges, alignment: Alignment | None
) -> Float[Tensor, "trial vocab"]:
    """Logits at the base's last token after the exchange; None exchanges nothing."""
    step = max(1, subject.rows_per_call(max(trials.base.width, 1)))
    out = []
    for start in range(0, len(trials), step):
        piece = trials.take(torch.arange(start, min(start + step, len(trials))))
        if alignment is None:
            out.append(subject.last_logits(piece.base))
            continue
        base, source = (_values(subject, batch, alignment.site, alignment.at) for batch in (piece.base, piece.source))
        mixed = alignment.mixed(base, source)
        out.append(_run(subject, piece.base, alignment.site, alignment.at, mixed))
    return torch.cat(out).cpu()


def interchange_accuracy(subject: Subject, trials: Interchanges, alignment: Alignment | None) -> Bool[Tensor, " trial"]:
    """Whether the right answer beats every wrong one after the exchange (after none, with `alignment` None)."""
    logits = interchange_logits(subject, trials, alignment)
    return _best(logits, trials.answers) > _best(logits, trials.wrong)


def _best(logits: Tensor, ids: Tensor) -> Tensor:
    values = logits.gather(1, ids.clamp(min=0).to(logits.device))
    return values.masked_fill((ids < 0).to(logits.device), -torch.inf).max(1).values


def _loss(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """Cross-entropy of the right answers among all candidates."""
    ids = torch.cat([answers, wrong], 1).to(logits.device)
    values = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    return values.logsumexp(1) - values[:, : answers.shape[1]].logsumexp(1)


def _orthonormal(free: Float[Tensor, "d width"]) -> Float[Tensor, "width d"]:
    """An orthonormal basis of the span of the columns, by QR with a fixed sign, so that it moves smoothly with them."""
    q, r = torch.linalg.qr(free)
    return (q * r.diagonal().sign().clamp(min=-1)).T


# ---- values at a site


def _site(subject: Subject, site: str) -> Site:
    found = subject.resolve([site])
    if len(found) != 1 or found[0].part == "logits":
        raise SiteError(f"{site!r} is no single place of the stream or of a branch.", remedy="Name one layer's site.")
    return found[0]


def _tail(subject: Subject, site: Site) -> list[int]:
    """Sizes of the axes that a read of the site has after its positions."""
    sizes = [subject.widths.get(axis, 0) for axis in site.axes[2:]]
    if site.position_axis != 1 or not sizes or 0 in sizes:
        raise SiteError(
            f"{site.name} has no vector at each position.", remedy="Take a stream, a branch's output or attn.z."
        )
    if site.heads and site.head_axis is not None:
        sizes[site.head_axis - 2] = len(site.heads)
        sizes = sizes if len(site.heads) > 1 else [*sizes[: site.head_axis - 2], *sizes[site.head_axis - 1 :]]
    return sizes


def _size(subject: Subject, site: str) -> int:
    """Length of the vectors at a site, heads together."""
    return math.prod(_tail(subject, _site(subject, site)))


def _check_width(width: int, d: int) -> None:
    if not 1 <= width <= d:
        raise DataError(f"A subspace of {width} dimensions was asked for; the site has {d}.")


@torch.no_grad()
def _values(subject: Subject, batch: Batch, site: str, at: At) -> Float[Tensor, "row *position d"]:
    value = next(iter(subject.read(batch, site, at=at, keep_device=True).values()))
    return value.reshape(*value.shape[: 1 if batch.columns(at)[1] else 2], -1)


def _run(subject: Subject, batch: Batch, site: str, at: At, value: Tensor) -> Float[Tensor, "row vocab"]:
    """Logits at the last token with a value written at the site; has a gradient where the value does."""
    one = _site(subject, site)
    columns, single = batch.columns(at)
    shaped = value.to(subject.dtype).reshape(*value.shape[:-1], *_tail(subject, one))
    # made here and not by `replace`, which would cut the value off from its graph
    edit = Edit(one.name, "replace", shaped, at=at)
    return subject._last(batch, [Bound(edit, one, None, columns, single)])
