"""Probes, steering and erasure of a user's own data: what the command line calls.

    told = probe_labels(subject, load_labelled("statements.csv"))
    eraser, told = erase_labels(subject, load_labelled("statements.csv"), site="layer.3.resid_post")

Each gives a document of JSON values with the four companions of a concept: selectivity (or why there is none), a null
that pays for the search of layers, the most salient distractor, and intervals by source. How they can mislead: as
`concepts.probes` and `concepts.erasure` say; here nothing is judged by a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.concepts import Direction, Probes, States, collect, train_probes
from tomoscope.concepts.answers import completion_log_probs, log_odds
from tomoscope.concepts.controls import distractors, median_split, selectivity, surface_states
from tomoscope.concepts.erasure import METHODS as ERASURES
from tomoscope.concepts.erasure import Eraser, Moments, inlp, one_hot, remaining
from tomoscope.concepts.linear import METHODS as PROBES
from tomoscope.concepts.splits import cluster_index, split
from tomoscope.data import LabelledTexts
from tomoscope.errors import DataError, PromptError, nearest
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, null_interval

Heard = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class ProbeRun:
    """Probes of a file's labels, and what stands beside them."""

    data: LabelledTexts
    probes: Probes
    surface: dict[str, Estimate]
    selective: Estimate
    found: dict[str, float]
    p_value: float

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        probes = self.probes
        areas = probes.roc_areas() if probes.n_classes == 2 else np.full(len(probes.sites), np.nan)
        return {
            "data": self.data.name, "n": len(self.data), "classes": list(self.data.classes), "method": probes.method,
            "notes": list(self.data.notes), "best": probes.best, "accuracy": _json(probes.accuracy()),
            "roc_area": _json(probes.roc_area()), "calibration_error": _json(probes.calibration()),
            "p_value": self.p_value, "majority": probes.majority,
            "shuffled_labels_best_layer": _json(null_interval(probes.null_best())) if probes.null.size else None,
            "surface": {name: _json(one) for name, one in self.surface.items()},
            "selectivity": _json(self.selective), "distractors": self.found,
            "layers": [
                {
                    "site": site, "accuracy": _json(probes.accuracy(site)),
                    "roc_area": None if np.isnan(areas[i]) else float(areas[i]),
                    "strength": float(probes.strengths[i]), "on_folds": float(probes.chosen_on_folds[i]),
                }
                for i, site in enumerate(probes.sites)
            ],
        }  # fmt: skip


def _json(one: Estimate) -> dict[str, Any]:
    return one.model_dump(mode="json")


def probe_labels(
    subject: Any,
    data: LabelledTexts,
    *,
    sites: Sequence[str] = ("layer.*.resid_post",),
    at: Any = "last",
    method: str = "logistic",
    types: Sequence[Any] | None = None,
    seed: int = 0,
    progress: Heard | None = None,
) -> ProbeRun:
    """Probes of labels at every site, with their companions.

    Args:
        subject: the model.
        data: from `load_labelled`.
        sites: where.
        at: position, or "mean".
        method: of the probe.
        types: what the control task gives random labels to; the sources by default.
        seed: of everything drawn.
        progress: called with (texts read, texts).

    Raises:
        DataError: an unknown method.
    """
    if method not in PROBES:
        raise DataError(f"There is no probe method {method!r}.", remedy=f"It is one of {', '.join(PROBES)}.")
    n_classes = len(data.classes)
    states = collect(subject, data.texts, ("embed", *sites), at=at, progress=progress)
    layers = States({site: value for site, value in states.items() if site != "embed"}, at)
    common: dict[str, Any] = {"clusters": data.clusters, "seed": seed, "fitted_on": data.name}
    name = data.classes[1] if n_classes == 2 else data.name
    probes = train_probes(layers, data.labels, n_classes, concept=name, method=method, nulls=19, **common)
    ids = [prompt.ids for prompt in subject.tokens(list(data.texts)).prompts]
    others = {**surface_states(data.texts, ids), "embedding": states["embed"]}
    rows = (probes.train, probes.test)
    surface = {
        key: train_probes(States({key: value}), data.labels, n_classes, nulls=0, held_out=rows, **common).accuracy()
        for key, value in others.items()
    }
    selective = Estimate.unknown("numbers have no control task", unit="accuracy")
    if n_classes:
        kinds = data.clusters if types is None else types
        made = selectivity(States({probes.best: states[probes.best]}), data.labels, kinds, n_classes, seed=seed)
        selective = Estimate.unknown(made, unit="accuracy") if isinstance(made, str) else made.at(probes.best)
    found: dict[str, float] = {}
    if n_classes == 2:
        test = probes.test
        length = median_split([len(ids[i]) for i in test])
        labels = {"the label itself": data.labels[test], "length": length}
        if len(set(data.groups)) > 1:
            labels["group"] = cluster_index([data.groups[i] for i in test])
        score = probes.scores[probes.sites.index(probes.best), :, 0].double().numpy()
        found = distractors(score, labels)
    return ProbeRun(data, probes, surface, selective, found, probes.p_value())


def erase_labels(
    subject: Any,
    data: LabelledTexts,
    *,
    site: str,
    at: Any = "last",
    method: str = "leace",
    seed: int = 0,
) -> tuple[Eraser, dict[str, Any]]:
    """Erase labels at a site and measure what fresh probes still find, at that site and at the last one after it.

    Raises DataError for an unknown method.
    """
    known = (*ERASURES[:3], "inlp")
    if method not in known:
        raise DataError(f"There is no erasure {method!r}.", remedy=nearest(method, known) or f"{', '.join(known)}.")
    n_classes = len(data.classes)
    if n_classes < 2:
        raise DataError("Erasure needs classes.", remedy="Give labels of classes.")
    last = f"layer.{subject.facts.n_layers - 1}.resid_post"
    states = collect(subject, data.texts, [site], at=at)
    (name,) = list(states)
    train, test = split(data.clusters, share=0.5, seed=seed, labels=data.labels)
    x = states[name]
    if method == "inlp":
        eraser = inlp(x[train], data.labels[train], n_classes, seed=seed)
    else:
        eraser = Moments.of(x[train], one_hot(data.labels[train], n_classes)).eraser(method)
    edited = [eraser.edit(name, at=None if at == "mean" else at)]
    after = collect(subject, data.texts, [last], at=at, edits=edited)[last]
    before = collect(subject, data.texts, [last], at=at)[last]
    clusters = [data.clusters[i] for i in test]
    document: dict[str, Any] = {
        "data": data.name, "n": len(data), "site": name, "method": method, "rank": eraser.rank,
        "moved": float((eraser(x[test]) - x[test]).norm() / x[test].norm()), "probes": {},
    }  # fmt: skip
    for key, value in (
        (f"{name} before", x), (f"{name} after", eraser(x)), (f"{last} before", before), (f"{last} after", after),
    ):  # fmt: skip
        found = remaining(value, data.labels, train=train, test=test, n_classes=n_classes, seed=seed)
        document["probes"][key] = {
            "linear": _json(bootstrap_interval(found.linear, seed=seed, clusters=clusters, unit="share of items")),
            "mlp": _json(bootstrap_interval(found.mlp, seed=seed, clusters=clusters, unit="share of items")),
            "majority": found.majority,
        }  # fmt: skip
    return eraser, document


def steer_doses(
    subject: Any,
    direction: Direction,
    prompts: Sequence[str],
    answers: tuple[str, str],
    texts: Sequence[str],
    *,
    doses: Sequence[float],
    most_loss: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """The dose curve of a direction on prompts (log-odds of two answers), the dose chosen on half and measured on half.

    Raises PromptError for fewer than 8 prompts.
    """
    from tomoscope.treat import DoseRule, choose_dose, dose_curve

    if len(prompts) < 8:
        raise PromptError(f"{len(prompts)} prompts.", remedy="Give at least eight: half choose the dose, half measure.")
    order = np.random.default_rng(seed).permutation(len(prompts))
    halves = [[prompts[i] for i in rows] for rows in (order[: len(order) // 2], order[len(order) // 2 :])]
    rule = DoseRule(most_loss=most_loss)
    curves = []
    for half in halves:

        def effect(edits: Any, half: list[str] = half) -> np.ndarray:
            return log_odds(completion_log_probs(subject, half, [answers] * len(half), edits=edits)).double().numpy()

        curves.append(
            dose_curve(subject, [direction], doses=doses, effect=effect, texts=texts, prompts=half[:4], seed=seed)
        )
    dose = choose_dose(curves[0], rule)
    held = curves[1]
    return {
        "direction": str(direction), "rule": rule.sentence(), "dose": dose,
        "rise": _json(held.rise(dose)) if dose else None,
        "over random": _json(held.over_random(dose)) if dose else None,
        "loss": _json(held.damage(dose)) if dose else None, "wrong way": held.wrong_way(),
        "curve": [
            {
                "dose": d, "effect": float(held.effect[i].mean()), "random": float(held.random[i].mean()),
                "loss": float(held.loss[i].mean()), "perplexity": float(np.exp(held.loss[i].mean())),
                "random_loss": float(held.random_loss[i].mean()), "kl": float(held.kl[i].mean()),
                "repetition": float(np.nanmean(held.repetition[i])),
            }
            for i, d in enumerate(held.doses)
        ],
    }  # fmt: skip


def save_direction(direction: Direction, folder: str | Path) -> Path:
    """Write a direction into a folder that is made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return direction.save(folder / "direction.safetensors")
