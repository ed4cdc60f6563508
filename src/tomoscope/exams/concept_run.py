"""Probes, truth without labels, steering and erasure of a user's own data: what the command line calls.

    told = probe_file(subject, "statements.csv", text="statement", label="label")
    told = truth_file(subject, "statements.csv")

Each gives a document of JSON values with the four companions of a concept: selectivity (or why there is none), a null
that pays for the search of layers, the most salient distractor, and intervals by source. How they can mislead: as
`concepts.probes`, `concepts.contrast` and `concepts.erasure` say; here nothing is judged by a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tomoscope.concepts import Direction, Probes, States, collect, train_probes
from tomoscope.concepts.answers import calibrated, completion_log_probs, log_odds
from tomoscope.concepts.contrast import PRESETS, Contrast, Pairs, ccs, crc_tpc, folded, lat
from tomoscope.concepts.controls import distractors, median_split, selectivity, surface_states
from tomoscope.concepts.erasure import METHODS as ERASURES
from tomoscope.concepts.erasure import Eraser, Moments, inlp, one_hot, remaining
from tomoscope.concepts.linear import METHODS as PROBES
from tomoscope.concepts.splits import cluster_index, split
from tomoscope.data import LabelledTexts
from tomoscope.errors import DataError, PromptError, nearest
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, difference_interval, null_interval

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
    probes = train_probes(layers, data.labels, n_classes, concept=name, method=method, nulls=19, **common)  # ty: ignore[invalid-argument-type]
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
    labels = torch.as_tensor(data.labels)
    train, test = split(data.clusters, share=0.4, seed=seed, labels=data.labels)
    clusters = [data.clusters[i] for i in test]
    whole = [text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}." for text in data.texts]
    rows: list[dict[str, Any]] = []
    best: tuple[float, Direction | None] = (-1.0, None)
    for template, yes, no in frames:
        prompts = [template.replace("{text}", text.strip()) for text in whole]
        states = collect(subject, [p + w for w in (yes, no) for p in prompts], sites, progress=progress)
        n = len(prompts)
        pairs = Pairs(torch.stack([v[:n] for v in states.by_site.values()]),
                      torch.stack([v[n:] for v in states.by_site.values()]))  # fmt: skip
        odds = log_odds(completion_log_probs(subject, prompts, [(yes, no)] * n))
        inside = torch.zeros(n, dtype=torch.bool)
        inside[torch.as_tensor(train)] = True
        truth = labels[test] == 1
        zero = ((odds[test] > 0) == truth).double().numpy()
        level = ((calibrated(odds, inside)[test] > 0) == truth).double().numpy()
        learn, held = pairs.take(torch.as_tensor(train)), pairs.take(torch.as_tensor(test))
        ceiling = train_probes(
            States({s: pairs.yes[i] - pairs.no[i] for i, s in enumerate(states)}), data.labels, concept="true",
            clusters=data.clusters, held_out=(train, test), nulls=9, seed=seed, fitted_on=data.name,
        )  # fmt: skip
        place = ceiling.sites.index(ceiling.best)

        def told(right: np.ndarray) -> dict[str, Any]:
            return _json(bootstrap_interval(right, seed=seed, clusters=clusters, unit="share of statements"))

        entry: dict[str, Any] = {
            "template": template, "words": [yes, no], "site": ceiling.best, "zero-shot": told(zero),
            "calibrated zero-shot": told(level), "logistic regression (ceiling)": told(ceiling.right[place]),
            "methods": {},
        }  # fmt: skip
        for name in UNSUPERVISED:
            found = _find(name, learn, restarts, steps, seed)
            if anchors:
                some = np.random.default_rng(seed).permutation(train)[:anchors]
                found = found.oriented(pairs.take(torch.as_tensor(some)), labels[some])
            score = found.score(held)
            right = ((score > 0) == truth).double()
            mine = right[place].numpy()
            sure = found.confidence(held)[place].argsort(descending=True)[: max(1, len(test) // 2)]
            entry["methods"][name] = {
                "accuracy": told(mine) if anchors else None, "folded accuracy": float(folded(right)[place]),
                "every site": [float(value) for value in right.mean(1)], "orientation": found.orientation,
                "restarts agree": float(found.agreement[place]),
                "losses": [float(v) for v in found.losses[place]],
                "gain over zero-shot": _json(
                    difference_interval(mine, zero, paired=True, clusters=clusters, seed=seed)
                ),
                "gain over calibrated zero-shot": _json(
                    difference_interval(mine, level, paired=True, clusters=clusters, seed=seed)
                ),
                "accuracy of the surer half": float(mine[sure.numpy()].mean()),
                "distractors": distractors(
                    score[place].double().numpy(),
                    {"truth": data.labels[test], "length": median_split([len(whole[i]) for i in test]),
                     "what the model answers": (odds[test] > 0).long().numpy()}
                    | ({"group": cluster_index([data.groups[i] for i in test])} if len(set(data.groups)) > 1 else {}),
                ),
            }  # fmt: skip
        rows.append(entry)
        folds = float(ceiling.chosen_on_folds[place])
        if folds > best[0]:
            best = (folds, ceiling.directions[ceiling.best])
    assert best[1] is not None
    return TruthRun({"data": data.name, "n": len(data), "held_out": len(test), "templates": rows}, best[1])


def _find(name: str, pairs: Pairs, restarts: int, steps: int, seed: int) -> Contrast:
    if name == "CRC-TPC":
        return crc_tpc(pairs)
    if name == "LAT":
        return lat(pairs, seed=seed)
    return ccs(pairs, preset=name.removeprefix("CCS "), restarts=restarts, steps=steps, seed=seed)  # ty: ignore[invalid-argument-type]


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
        eraser = Moments.of(x[train], one_hot(data.labels[train], n_classes)).eraser(method)  # ty: ignore[invalid-argument-type]
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
