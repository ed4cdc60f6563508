"""Labels for many features: explain, score on other texts, compare with other features' labels, keep.

    labeller = Labeller(book, RuleExplainer(say, lexicon), RuleJudge())
    for scored in labeller.run(range(100), "labels.jsonl"):
        print(scored.latent, scored.label, scored.detection)

A label is made from some texts and scored on others. Its control is the mean score of `shuffles` labels of other
features on the same texts; a label whose interval does not lie above its control is dropped: the feature is
"unlabelled", with the reason. Results are lines of a file; what stands there is not done again. `plan_labels` tells
tokens, cost and time before anything is asked.

How it can mislead: see `label_scores`; a control of very different features is easy, of similar ones hard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tomoscope.errors import DataError
from tomoscope.features.book import Context, FeatureBook
from tomoscope.features.coder import SparseCoder
from tomoscope.features.label_models import LanguageModel, explanation_prompt, mend, read_label
from tomoscope.features.label_rules import Lexicon, Say, Words, learn_rule
from tomoscope.features.label_scores import LEAST, Judge, Label, detection, fuzzing, intervention, simulation
from tomoscope.findings.control import stable_seed
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.files import append_lines
from tomoscope.findings.record import Record
from tomoscope.model import Subject

SCORES = ("detection", "fuzzing", "simulation", "intervention")


class Explainer(Protocol):
    """Says what a feature is, from texts with its activations."""

    @property
    def name(self) -> str:
        """Which, for the record."""
        ...

    def explain(self, contexts: Sequence[Context]) -> Label:
        """A label; of empty text where nothing can be said."""
        ...


@dataclass(frozen=True, eq=False)
class RuleExplainer:
    """Learns a rule (`label_rules`); needs no model.

    Attributes:
        say: from a token id to its text.
        lexicon: attribute -> words.
    """

    say: Say
    lexicon: Lexicon = field(default_factory=dict)
    name: str = "rules"

    @cached_property
    def _words(self) -> Words:
        return Words(self.lexicon)

    def explain(self, contexts: Sequence[Context]) -> Label:
        """The rule in words."""
        rule = learn_rule(contexts, say=self.say, lexicon=self._words)
        return Label(rule.text, rule)


@dataclass(frozen=True, eq=False)
class ModelExplainer:
    """Asks a language model.

    Attributes:
        model: which.
        say: from a token id to its text.
        texts: how many it is shown.
        max_tokens: of its answer.
    """

    model: LanguageModel
    say: Say
    texts: int = 20
    max_tokens: int = 24

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    def explain(self, contexts: Sequence[Context]) -> Label:
        """Its answer's first line."""
        shown = [context for context in contexts if context.active][: self.texts]
        if not shown:
            return Label("")
        answer = self.model.ask([explanation_prompt(shown, self.say)], max_tokens=self.max_tokens)
        return Label(read_label(answer[0]))


class ScoredLabel(Record):
    """A feature's label with its scores; the label is empty where it does not beat its control."""

    latent: int
    label: str
    proposed: str
    """What the explainer said."""
    explainer: str
    why_not: str = ""
    """Why it is unlabelled; "" where it is labelled."""
    detection: Estimate
    fuzzing: Estimate
    simulation: Estimate
    intervention: Estimate
    control: dict[str, Estimate]
    """The scores of other features' labels on the same texts."""
    token_entropy: float
    """Bits, over the tokens that it fires on."""
    single_token: float
    """Share of the commonest one."""
    fires: int
    seed: int


@dataclass(frozen=True)
class LabelPlan:
    """What labelling will take, before it is done.

    Attributes:
        features: how many.
        requests: to a language model.
        tokens_in, tokens_out: of all requests, about four characters a token.
        cost: by the prices given.
        seconds: at the speed given; None where none was.
    """

    features: int
    requests: int
    tokens_in: int
    tokens_out: int
    cost: float
    seconds: float | None


def plan_labels(
    features: int,
    *,
    texts: int = 20,
    contexts: int = 200,
    shuffles: int = 3,
    window: int = 29,
    price: tuple[float, float] = (0.0, 0.0),
    tokens_per_second: float | None = None,
) -> LabelPlan:
    """Requests, tokens, cost and time of labelling with a language model that explains and judges.

    One explanation of `texts` windows, and a yes-or-no question a context for detection, one a marking for fuzzing
    (both markings of the half that fires), each again for `shuffles` labels of others.

    Args:
        features: how many.
        texts: windows shown to the explainer.
        contexts: texts a label is scored on.
        shuffles: labels of other features scored on them.
        window: tokens of a window.
        price: currency per million tokens in and out.
        tokens_per_second: of the server or machine, in and out together.
    """
    asked = 2 * contexts * (1 + shuffles)
    tokens_in = features * (texts * (window + 6) + 60 + asked * (window + 40))
    tokens_out = features * (24 + asked * 4)
    cost = (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    seconds = (tokens_in + tokens_out) / tokens_per_second if tokens_per_second else None
    return LabelPlan(features, features * (1 + asked), tokens_in, tokens_out, cost, seconds)


@dataclass(eq=False)
class Labeller:
    """Labels the features of a book.

    Attributes:
        book: the dashboards.
        explainer: makes labels.
        judge: applies them.
        subject, coder: for intervention scores; not measured without.
        active, silent: texts that a label is scored on.
        shown: texts of each sort that it is made from.
        shuffles: labels of other features as the control.
        seed: of all draws.
    """

    book: FeatureBook
    explainer: Explainer
    judge: Judge
    subject: Subject | None = None
    coder: SparseCoder | None = None
    active: int = 100
    silent: int = 100
    shown: int = 40
    shuffles: int = 3
    seed: int = 0

    def run(self, latents: Iterable[int], path: str | Path | None = None) -> Iterator[ScoredLabel]:
        """Label features one after the other; those whose line stands in the file are given from there.

        Raises:
            DataError: a feature that is not there, or a file of another explainer or seed.
        """
        wanted = [int(latent) for latent in latents]
        if path is not None:
            mend(Path(path))
        known = read_labels(path) if path is not None and Path(path).exists() else {}
        for one in known.values():
            if one.explainer != self.explainer.name or one.seed != self.seed:
                raise DataError(f"{path} holds labels by {one.explainer} with seed {one.seed}.", remedy="Name another.")
        proposed: dict[int, Label] = {}
        for latent in wanted:
            if latent in known:
                yield known[latent]
                continue
            scored = self._label(latent, wanted, proposed)
            if path is not None:
                append_lines(Path(path), [json.dumps(scored.model_dump(mode="json"))])
            yield scored

    def explain(self, latent: int) -> tuple[Label, list[int]]:
        """A feature's label, and the texts it was made from."""
        fire, still = self.book.drawn(latent, active=self.shown, silent=self.shown, seed=self.seed)
        return self.explainer.explain([*fire, *still]), [context.row for context in (*fire, *still)]

    def _label(self, latent: int, wanted: Sequence[int], proposed: dict[int, Label]) -> ScoredLabel:
        label, used = self.explain(latent)
        summary = self.book.summary(latent)
        fire, still = self.book.drawn(
            latent, active=self.active, silent=self.silent, seed=stable_seed(self.seed, "scored"), exclude=used
        )
        why = ""
        if not label.text:
            why = "the explainer had nothing to say"
        elif min(len(fire), len(still)) < LEAST:
            why = f"{len(fire)} further texts on which it fires and {len(still)} on which it does not are too few"
        if why:
            none = {name: Estimate.unknown(why) for name in SCORES}
            scores, control = none, {}
        else:
            scores = self._scores(latent, label, fire, still)
            others = self._others(latent, wanted, proposed)
            control = _control([self._scores(latent, other, fire, still, brief=True) for other in others])
            why = _refused(scores, control)
        return ScoredLabel(
            latent=latent, label="" if why else label.text, proposed=label.text, explainer=self.explainer.name,
            why_not=why, **scores, control=control, token_entropy=float(summary["token_entropy"]),
            single_token=float(summary["single_token"]), fires=int(summary["fires"]), seed=self.seed,
        )  # fmt: skip

    def _others(self, latent: int, wanted: Sequence[int], proposed: dict[int, Label]) -> list[Label]:
        """Labels of other features, the same ones whatever is already in the file."""
        rng = np.random.default_rng(stable_seed(self.seed, "shuffle", latent))
        counts = self.book.column("fires")
        pool = [one for one in range(self.book.n_features) if one != latent and counts[one] >= 2 * LEAST]
        found = []
        for other in rng.permutation(pool)[: 4 * self.shuffles].tolist():
            if other not in proposed:
                proposed[other] = self.explain(other)[0]
            if proposed[other].text:
                found.append(proposed[other])
            if len(found) == self.shuffles:
                break
        return found

    def _scores(
        self, latent: int, label: Label, fire: Sequence[Context], still: Sequence[Context], *, brief: bool = False
    ) -> dict[str, Estimate]:
        seed = stable_seed(self.seed, "score", latent)
        both = [*fire, *still]
        out = {
            "detection": detection(self.judge, label, fire, still),
            "fuzzing": fuzzing(self.judge, label, fire, seed=seed),
            "simulation": simulation(self.judge, label, both, seed=seed),
        }
        if brief:
            return out
        if self.subject is None or self.coder is None:
            out["intervention"] = Estimate.unknown("no model was given")
        else:
            site = self.book.manifest["site"]
            out["intervention"] = intervention(
                self.judge, label, both, self.subject, self.coder, latent, site=site, seed=seed
            )
        return out


def _control(scores: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
    """The mean of each score over other features' labels, with their range."""
    from tomoscope.findings.statistics import null_interval

    out = {}
    for name in ("detection", "fuzzing", "simulation"):
        values = [value for one in scores if (value := one[name].value) is not None]
        out[name] = null_interval(values, unit=scores[0][name].unit if scores else "")
    return out


def _refused(scores: dict[str, Estimate], control: dict[str, Estimate]) -> str:
    """Why a label does not stand; "" where it does."""
    found, chance = scores["detection"], control["detection"]
    if chance.value is None:
        return "there is no other feature with a label to compare it with"
    if found.low is None or found.low <= max(0.5, chance.value):
        return f"its detection score {found} does not lie above {max(0.5, chance.value):.2f}, that of other labels"
    return ""


def read_labels(path: str | Path) -> dict[int, ScoredLabel]:
    """The labels of a file, by feature; a last line that a crash cut is left out."""
    out = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            one = ScoredLabel.model_validate_json(line)
        except ValueError:
            continue
        out[one.latent] = one
    return out


def index_labels(labels: dict[int, ScoredLabel]) -> dict[int, tuple[str, float | None]]:
    """Labels that stand, for `build_index`: feature -> (label, detection score)."""
    return {latent: (one.label, one.detection.value) for latent, one in labels.items() if one.label}


def say_of(tokenizer: Any) -> Say:
    """From a token id to its text, each decoded once."""
    known: dict[int, str] = {}

    def say(token: int) -> str:
        if token not in known:
            known[token] = tokenizer.decode([int(token)])
        return known[token]

    return say
