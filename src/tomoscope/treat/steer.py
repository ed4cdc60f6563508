"""Steering: directions from pairs of texts, and the edits that write them.

    direction = contrast_direction(subject, with_it, without_it, "layer.3.resid_post")
    subject.generate(prompts, edits=steering([direction], 2.0))

- activation addition (Turner et al. 2023, arXiv:2308.10248) and contrastive activation addition (CAA, Panickssery et
  al. 2023, arXiv:2312.06681): the mean difference over pairs of prompts that differ in the behaviour alone; one pair is
  activation addition. For multiple-choice pairs read at the letter ("at"), as CAA does.
- "pca": the first principal component of the differences, uncentred (a centred one would subtract the constant part,
  which is the concept).
- inference-time intervention (ITI, Li et al. 2023, arXiv:2306.03341): the heads whose z tells the labels best, each
  with its own direction and dose in its own standard deviations.
- `clamp` sets what a direction reads to a value; `only_where` steers only prompts in which a condition is read
  (conditional steering, Lee et al. 2024).

Edits without `at` are written at every token, those that are generated with a cache too; `at` and `during` restrict
them. How it can mislead: pairs that differ in more than the behaviour steer all of it; a dose that moves the answer may
break the text (`dose_curve` shows both).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tomoscope.concepts.direction import Direction, affine
from tomoscope.concepts.probes import train_probes
from tomoscope.concepts.states import States, collect
from tomoscope.errors import DataError
from tomoscope.model import Edit, Subject


def contrast_direction(
    subject: Subject,
    with_it: Sequence[Any],
    without_it: Sequence[Any],
    site: str,
    *,
    at: Any = "last",
    concept: str = "behaviour",
    method: Literal["mean", "pca"] = "mean",
) -> Direction:
    """The direction from texts without a behaviour to texts with it, pair by pair.

    Args:
        subject: the model.
        with_it: texts that show it.
        without_it: their partners that do not.
        site: where; the direction is of this site alone.
        at: the position read in both ("last", -2 for the letter of "(A)", a span).
        concept: a name.
        method: "mean" or "pca".

    Returns:
        Its `shift` is the whole mean step; its notes have "agreement", the mean cosine between the pairs' differences,
        which tells beforehand how well steering will work (Braun et al. 2025), and "share", the share of variance of
        the uncentred differences along it.

    Raises:
        DataError: unequal numbers of texts, none, or no difference at all.
    """
    if len(with_it) != len(without_it) or not len(with_it):
        raise DataError(f"{len(with_it)} texts with and {len(without_it)} without.", remedy="Give pairs.")
    both = collect(subject, [*with_it, *without_it], site, at=at)
    (name,) = list(both)
    up, down = both[name][: len(with_it)].double(), both[name][len(with_it) :].double()
    difference = up - down
    step = difference.mean(0)
    total = float(difference.square().sum())
    if total == 0.0:
        raise DataError(f"The pairs do not differ at {name}.", remedy="Read another position or site.")
    if method == "pca":
        line = torch.linalg.svd(difference, full_matrices=False)[2][0]
        line = line if float((difference @ line).mean()) >= 0 else -line
        step = line * float((difference @ line).mean())
    unit = step / step.norm().clamp(min=1e-30)
    each = torch.nn.functional.normalize(difference, dim=-1)
    n = len(each)
    agreement = float(((each.sum(0)).square().sum() - n) / (n * (n - 1))) if n > 1 else 1.0
    middle = (up.mean(0) + down.mean(0)) / 2
    notes = {"agreement": agreement, "share": float((difference @ unit).square().sum() / total)}
    notes["wrong way"] = float(((difference @ unit) < 0).double().mean())
    return Direction(
        concept, name, unit.float(), -float(unit @ middle), step.float(), middle.float(), at, f"pairs, {method}",
        n=n, spread=float((both[name].double() @ unit).std()), notes=notes,
    )  # fmt: skip


def steering(
    directions: Sequence[Direction], strength: float, *, at: Any = None, rows: Any = None, during: str = "all"
) -> list[Edit]:
    """The edits that add `strength` x each direction's `shift`: all of one dose."""
    return [one.write(strength, at=at, rows=rows, during=during) for one in directions]


def clamp(direction: Direction, value: float, *, at: Any = None, rows: Any = None, during: str = "all") -> Edit:
    """Set what the direction reads (its score) to a value at every position, moving along its shift."""
    assert direction.shift is not None
    vector = direction.vector.double()
    read = float(vector @ direction.shift.double())
    if abs(read) < 1e-30:
        raise DataError(f"{direction.concept!r} does not read its own shift.", remedy="Give another direction.")
    # a point whose score is the value: the affine edit sets every score to that of its mean
    point = vector * (value - direction.bias) / float(vector @ vector)
    return affine(
        direction.site, direction.vector[:, None] / read, direction.shift[None], point.float(), at=at, rows=rows,
        during=during,
    )  # fmt: skip


def only_where(
    subject: Subject,
    prompts: Sequence[Any],
    condition: Direction,
    edits: Sequence[Edit],
    *,
    threshold: float = 0.0,
) -> list[Edit]:
    """The same edits for those prompts alone in which a condition's score exceeds a threshold (read without edits)."""
    states = collect(subject, list(prompts), condition.site, at=condition.at)[condition.site]
    rows = tuple(int(row) for row in (condition.score(states) > threshold).nonzero()[:, 0])
    if not rows:
        return []
    kept = []
    for edit in edits:
        both = rows if edit.rows is None else tuple(row for row in edit.rows if row in rows)
        if both:
            kept.append(dataclasses.replace(edit, rows=both))
    return kept


def iti_heads(
    subject: Subject,
    texts: Sequence[Any],
    labels: Sequence[int] | np.ndarray,
    *,
    count: int = 8,
    clusters: Sequence[Any] | None = None,
    at: Any = "last",
    concept: str = "truth",
    seed: int = 0,
) -> list[Direction]:
    """The `count` heads whose z tells two classes best (on folds), as directions of those heads.

    Each direction's `shift` is one standard deviation of the head's projections along the unit difference of the class
    means, so that `steering(heads, 15.0, at="last")` is ITI with alpha 15.

    Raises:
        DataError: fewer heads than asked for.
    """
    facts = subject.facts
    if not facts.n_heads or count > facts.n_heads * facts.n_layers:
        raise DataError(f"{count} heads of {facts.n_heads * facts.n_layers}.", remedy="Ask for fewer.")
    whole = collect(subject, texts, "layer.*.attn.z", at=at)
    by_head: dict[str, Tensor] = {}
    for site, value in whole.items():
        shaped = value.reshape(len(value), facts.n_heads, -1)
        by_head.update({f"{site}[head={head}]": shaped[:, head].contiguous() for head in range(facts.n_heads)})
    probes = train_probes(
        States(by_head, at), labels, concept=concept, method="ridge", clusters=clusters, nulls=0, seed=seed
    )
    order = probes.chosen_on_folds.argsort(descending=True, stable=True)[:count]
    chosen = []
    for place in order.tolist():
        found = probes.directions[probes.sites[place]]
        assert found.shift is not None
        assert found.mean is not None
        unit = found.shift / found.shift.norm().clamp(min=1e-30)
        spread = float((by_head[found.site] @ unit).std())
        notes = {"accuracy_on_folds": float(probes.chosen_on_folds[place])}
        chosen.append(
            dataclasses.replace(
                found, vector=unit, bias=-float(unit @ found.mean), shift=unit * spread, method="ITI head", notes=notes
            )
        )
    return chosen
