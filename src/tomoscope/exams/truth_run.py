"""Truth without labels on statements of a user's own: what `tomoscope truth` calls.

    told = truth_labels(subject, load_labelled("statements.csv"))
    told.document["templates"][0]["methods"]["CCS paper"]

Every unsupervised method at every site and template, between zero-shot (plain, with the median of the training part's
log-odds for a threshold, and with that of content-free inputs; Zhao et al. 2021, arXiv:2102.09690) and a supervised
ceiling. How they can mislead: as `concepts.contrast` says; the median is right for balanced sets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomoscope.concepts import Direction, Probes, States, collect, train_probes
from tomoscope.concepts.answers import calibrated, completion_log_probs, contextual, log_odds
from tomoscope.concepts.contrast import PRESETS, Contrast, Pairs, ccs, crc_tpc, folded, lat
from tomoscope.concepts.controls import distractors, median_split
from tomoscope.concepts.splits import cluster_index, split
from tomoscope.data.labelled import LabelledTexts
from tomoscope.errors import DataError
from tomoscope.exams.concept_run import Heard
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, difference_interval


@dataclass(frozen=True, eq=False)
class TruthRun:
    """Truth without labels on a file of statements."""

    document: dict[str, Any]
    direction: Direction


FRAMES: tuple[tuple[str, str, str], ...] = (
    ("Claim: {text} This claim is", " true", " false"),
    ("{text} Is this right? Answer:", " yes", " no"),
)
"""Template, and the words that complete it where the statement is true and where it is false."""
UNSUPERVISED = (*(f"CCS {preset}" for preset in PRESETS), "CRC-TPC", "LAT")
CONTENT_FREE: tuple[str, ...] = ("N/A", "", "[MASK]")
"""Statements that say nothing, for contextual calibration."""


@dataclass(frozen=True, eq=False)
class _Setup:
    """What all templates share."""

    subject: Any
    data: LabelledTexts
    train: np.ndarray
    test: np.ndarray
    whole: list[str]
    sites: Sequence[str]
    restarts: int
    steps: int
    anchors: int
    seed: int
    progress: Heard | None

    @property
    def clusters(self) -> list[Any]:
        return [self.data.clusters[i] for i in self.test]

    @property
    def truth(self) -> Tensor:
        return torch.as_tensor(self.data.labels[self.test]) == 1

    def share(self, right: np.ndarray) -> dict[str, Any]:
        """As JSON values, with an interval by source."""
        return _json(bootstrap_interval(right, seed=self.seed, clusters=self.clusters, unit="share of statements"))

    def gain(self, mine: np.ndarray, base: np.ndarray) -> dict[str, Any]:
        """Of one method over another, item by item."""
        return _json(difference_interval(mine, base, paired=True, clusters=self.clusters, seed=self.seed))


@dataclass(frozen=True, eq=False)
class _Read:
    """One template's states, answers, baselines and ceiling."""

    pairs: Pairs
    odds: Tensor
    zero: dict[str, np.ndarray]
    ceiling: Probes

    @property
    def place(self) -> int:
        """The site that the ceiling's folds chose."""
        return self.ceiling.sites.index(self.ceiling.best)


def truth_labels(
    subject: Any,
    data: LabelledTexts,
    *,
    frames: Sequence[tuple[str, str, str]] = FRAMES,
    sites: Sequence[str] = ("layer.*.resid_post",),
    restarts: int = 10,
    steps: int = 1000,
    anchors: int = 8,
    seed: int = 0,
    progress: Heard | None = None,
) -> TruthRun:
    """Every unsupervised method at every site and template, between zero-shot and a supervised ceiling.

    Training and held-out items are split by source. Labels are used for the ceiling, for the choice of the site by that
    ceiling's folds, for the sign (by `anchors` labelled training items), and to measure; never to find a direction.

    Args:
        subject: a decoder with a tokenizer.
        data: statements with two classes, the second of which is the true one.
        frames: templates with their two words.
        sites: where.
        restarts: of CCS.
        steps: of CCS.
        anchors: labelled training items that set the sign; 0 leaves it undetermined, and accuracies folded.
        seed: of everything drawn.
        progress: called with (texts read, texts).

    Raises:
        DataError: other than two classes.
    """
    if len(data.classes) != 2:
        raise DataError(f"{data.name} has {len(data.classes)} classes; truth has two.", remedy="Label true and false.")
    train, test = split(data.clusters, share=0.4, seed=seed, labels=data.labels)
    whole = [text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}." for text in data.texts]
    setup = _Setup(subject, data, train, test, whole, sites, restarts, steps, anchors, seed, progress)
    rows, ceilings = [], []
    for template, yes, no in frames:
        read = _read(setup, template, yes, no)
        entry: dict[str, Any] = {"template": template, "words": [yes, no], "site": read.ceiling.best}
        entry |= {name: setup.share(right) for name, right in read.zero.items()}
        entry["logistic regression (ceiling)"] = setup.share(read.ceiling.right[read.place])
        entry["methods"] = {name: _method(setup, read, name) for name in UNSUPERVISED}
        rows.append(entry)
        ceilings.append(read.ceiling)
    best = max(ceilings, key=lambda one: float(one.chosen_on_folds[one.sites.index(one.best)]))
    document = {"data": data.name, "n": len(data), "held_out": len(test), "templates": rows}
    return TruthRun(document, best.directions[best.best])


def _json(one: Estimate) -> dict[str, Any]:
    return one.model_dump(mode="json")


def _read(setup: _Setup, template: str, yes: str, no: str) -> _Read:
    subject, data, n = setup.subject, setup.data, len(setup.whole)
    prompts = [template.replace("{text}", text.strip()) for text in setup.whole]
    both = [p + w for w in (yes, no) for p in prompts]
    states = collect(subject, both, setup.sites, progress=setup.progress)
    values = list(states.by_site.values())
    pairs = Pairs(torch.stack([v[:n] for v in values]), torch.stack([v[n:] for v in values]))
    odds = log_odds(completion_log_probs(subject, prompts, [(yes, no)] * n))
    empty = [template.replace("{text}", text).strip() for text in CONTENT_FREE]
    free = log_odds(completion_log_probs(subject, empty, [(yes, no)] * len(empty)))
    inside = torch.zeros(n, dtype=torch.bool)
    inside[torch.as_tensor(setup.train)] = True
    scores = {
        "zero-shot": odds, "calibrated zero-shot": calibrated(odds, inside),
        "contextually calibrated zero-shot": contextual(odds, free),
    }  # fmt: skip
    zero = {name: ((one[setup.test] > 0) == setup.truth).double().numpy() for name, one in scores.items()}
    ceiling = train_probes(
        States({s: pairs.yes[i] - pairs.no[i] for i, s in enumerate(states)}), data.labels, concept="true",
        clusters=data.clusters, held_out=(setup.train, setup.test), nulls=9, seed=setup.seed, fitted_on=data.name,
    )  # fmt: skip
    return _Read(pairs, odds, zero, ceiling)


def _method(setup: _Setup, read: _Read, name: str) -> dict[str, Any]:
    """One unsupervised method on one template."""
    data, test, place = setup.data, setup.test, read.place
    held = read.pairs.take(torch.as_tensor(test))
    found = _find(name, read.pairs.take(torch.as_tensor(setup.train)), setup.restarts, setup.steps, setup.seed)
    if setup.anchors:
        some = torch.as_tensor(np.random.default_rng(setup.seed).permutation(setup.train)[: setup.anchors])
        found = found.oriented(read.pairs.take(some), torch.as_tensor(data.labels)[some])
    score = found.score(held)
    right = ((score > 0) == setup.truth).double()
    mine = right[place].numpy()
    sure = found.confidence(held)[place].argsort(descending=True)[: max(1, len(test) // 2)]
    others: dict[str, np.ndarray] = {
        "truth": data.labels[test], "length": median_split([len(setup.whole[i]) for i in test]),
        "what the model answers": (read.odds[test] > 0).long().numpy(),
    }  # fmt: skip
    if len(set(data.groups)) > 1:
        others["group"] = cluster_index([data.groups[i] for i in test])
    return {
        "accuracy": setup.share(mine) if setup.anchors else None, "folded accuracy": float(folded(right)[place]),
        "every site": [float(value) for value in right.mean(1)], "orientation": found.orientation,
        "restarts agree": float(found.agreement[place]), "losses": [float(v) for v in found.losses[place]],
        **{f"gain over {base}": setup.gain(mine, one) for base, one in read.zero.items()},
        "accuracy of the surer half": float(mine[sure.numpy()].mean()),
        "distractors": distractors(score[place].double().numpy(), others),
    }  # fmt: skip


def _find(name: str, pairs: Pairs, restarts: int, steps: int, seed: int) -> Contrast:
    if name == "CRC-TPC":
        return crc_tpc(pairs)
    if name == "LAT":
        return lat(pairs, seed=seed)
    return ccs(pairs, preset=name.removeprefix("CCS "), restarts=restarts, steps=steps, seed=seed)  # ty: ignore[invalid-argument-type]
