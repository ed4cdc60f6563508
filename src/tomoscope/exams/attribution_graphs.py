"""Do attribution graphs name the features that carry a task's answer, and by how much? With a user's transcoders.

For each prompt a graph is made of the model's own answer; the features it calls most influential are taken away in the
model, all at once and one at a time. Two claims a task:

- influence: without them the answer's logit (less the mean logit) falls, more than without as many other features that
  are active on the same prompt, drawn at random;
- foretold: what each removal does to the answer is what the graph said (Pearson's correlation over features and
  prompts), beside the same forecasts given to other features of the same prompt.

The choice of features follows from the graph alone, which never sees an intervention, so no prompts are kept apart.

How it can mislead: a feature that fires on every prompt is influential in all of them and says nothing of the task;
removal takes the model off its distribution; where the transcoders explain little (the log says the scores), most of
the answer passes through errors, which nobody takes away. Source: Ameisen et al. 2025, "Circuit Tracing".

Steps: transcoders; prompts that the model gets right; `trace` each; pool; claims, a picture of the first graph.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from pydantic import Field

from tomoscope.errors import TomoscopeError
from tomoscope.exams.attribution_figures import graph_figure
from tomoscope.exams.attribution_run import Traced, trace
from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import Ready, TaskOptions, able, attempt, heading, title
from tomoscope.features import SparseCoder, Transcoders, TranscoderSet, load_transcoders
from tomoscope.findings.estimate import format_number as number
from tomoscope.findings.finding import Control, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, null_interval, null_p_value
from tomoscope.findings.verdict import Rule

UNIT = "logits"
FEWEST = 8
CLAIMS = {
    "influence": "the features that attribution graphs call most influential carry the answer.",
    "foretold": "attribution graphs foretell what taking a feature away does to the answer.",
}
_GIVEN: ContextVar[Transcoders | None] = ContextVar("transcoders of a specimen", default=None)


@contextmanager
def transcoders_as(parts: Any) -> Generator[None]:
    """For a while, exams use these transcoders: W_enc, W_dec, b_enc, b_dec of each layer, or None for no change."""
    if not parts:
        yield
        return
    made = TranscoderSet([SparseCoder(**one) for one in parts if isinstance(one, Mapping)], scan="the specimen's own")
    token = _GIVEN.set(made)
    try:
        yield
    finally:
        _GIVEN.reset(token)


class GraphOptions(TaskOptions):
    """Whose transcoders, which tasks, how many prompts, and how many features are taken away."""

    transcoders: str = Field("", description="A folder of transcoders for every layer, in circuit-tracer's files.")
    tasks: tuple[str, ...] = Field(
        ("facts", "ioi", "agreement", "world_two_hop"), description="Tasks whose prompts to explain."
    )
    n: int = Field(24, ge=8, le=10_000, description="Prompts a task.")
    tested: int = Field(5, ge=1, le=1000, description="Features a prompt that are taken away, and as many others.")
    max_features: int = Field(4000, ge=1, le=10**7, description="Active features of a prompt that get rows.")
    draws: int = Field(199, ge=19, le=10**6, description="Permutations of the forecasts.")


def run_graphs(context: Context) -> Iterator[Finding]:
    """For each task that the subject does: graphs, tested."""
    options = context.options
    try:
        coders = _GIVEN.get() or (load_transcoders(options.transcoders) if options.transcoders else None)
    except TomoscopeError as error:
        yield context.not_measured("transcoders", ATTRIBUTION_GRAPHS.title, error.what)
        return
    if coders is None:
        why = "no transcoders were given (its option transcoders names a folder of them)"
        yield context.not_measured("transcoders", ATTRIBUTION_GRAPHS.title, why)
        return
    for done, name in enumerate(options.tasks):
        context.progress(done, len(options.tasks), title(name))
        task = able(context, name, options.n)
        if isinstance(task, str):
            for kind in CLAIMS:
                yield context.not_measured(f"{name}_{kind}", _sentence(name, kind), task)
            continue
        made: list[_Case] = []

        def influence(name: str = name, task: Ready = task, made: list[_Case] = made) -> Finding:
            made.append(_Case(context, coders, name, task))
            return made[0].influence()

        yield attempt(context, f"{name}_influence", _sentence(name, "influence"), influence)
        if made:
            yield attempt(context, f"{name}_foretold", _sentence(name, "foretold"), made[0].foretold)
        else:
            yield context.not_measured(f"{name}_foretold", _sentence(name, "foretold"), "no graph could be made")
    context.progress(len(options.tasks), len(options.tasks))


def _sentence(name: str, kind: str) -> str:
    return f"In {title(name)}, {CLAIMS[kind]}"


class _Case:
    """The graphs of one task's prompts."""

    def __init__(self, context: Context, coders: Transcoders, name: str, task: Ready) -> None:
        self.context, self.name, self.task = context, name, task
        options, subject = context.options, context.subject
        self.rows = np.flatnonzero(task.right)[: options.n]
        self.traced: list[Traced] = []
        for row in context.track(self.rows.tolist(), title(name)):
            answer = int(task.pairs.answers[row, 0])
            self.traced.append(
                trace(
                    subject, coders, task.raw[row].clean.text, targets=[answer], max_features=options.max_features,
                    tested=options.tested, seed=context.seed_for(f"{name} {row}") % 2**31,
                )
            )  # fmt: skip
        self.clusters = [task.clusters[row] for row in self.rows]
        shown = [f"{np.mean([getattr(one.scores, kind) for one in self.traced]):.3f}" for kind in _SCORES]
        context.log(
            f"{title(name)}: " + ", ".join(f"{kind} {value}" for kind, value in zip(_SCORES, shown, strict=True))
        )

    def influence(self) -> Finding:
        """The fall of the answer's logit without the influential features, beside others."""
        context, name = self.context, self.name
        whole = [one for one in self.traced if one.others]
        if len(whole) < FEWEST:
            why = f"only {len(whole)} prompts have other active features to compare with, fewer than {FEWEST}"
            return context.not_measured(f"{name}_influence", _sentence(name, "influence"), why)
        keys = [key for key, one in zip(self.clusters, self.traced, strict=True) if one.others]
        fell, others = (np.array([-one.effects(together=True)[i][0] for one in whole]) for i in range(2))
        seed, count = context.seed_for(f"{name} influence"), int(np.median([len(one.chosen) for one in whole]))
        mine = bootstrap_interval(fell, seed=seed, clusters=keys, unit=UNIT)
        return context.claim(
            f"{name}_influence",
            f"In {title(name)}, the features that attribution graphs call most influential carry the answer: without "
            f"{count} of them its logit falls by {number(mine.value or 0.0)}.",
            estimate=mine,
            controls=[
                Control(
                    name="other active features",
                    estimate=bootstrap_interval(others, seed=seed, clusters=keys, unit=UNIT),
                    description="As many other features that are active on the same prompt, drawn at random.",
                )
            ],
            p_value=sign_flip_test(fell - others, seed=seed, clusters=keys),
            test="a paired sign-flip test over prompts", rule="influence", sites=self._sites(), positions="all",
            figures=[context.figure(f"{name}_graph", graph_figure(self.traced[0].pruned, heading(name)))],
            chosen_on=self._note(), measured_on=self._note(),
        )  # fmt: skip

    def foretold(self) -> Finding:
        """Correlation of foretold and measured changes of the answer, beside forecasts exchanged within prompts."""
        context, name, unit = self.context, self.name, "Pearson's r"
        told = [one.tested.predicted[:, one.graph.n_features].double().cpu().numpy() for one in self.traced]
        came = [np.concatenate(one.effects()) for one in self.traced]
        found = _correlation(told, came)
        if not np.isfinite(found) or len(told) < FEWEST:
            why = f"the changes of {len(told)} prompts do not vary, or are too few (at least {FEWEST})"
            return context.not_measured(f"{name}_foretold", _sentence(name, "foretold"), why)
        generator = context.rng(f"{name} exchanged")
        chance = [
            _correlation([generator.permutation(one) for one in told], came) for _ in range(context.options.draws)
        ]
        keys, drawn = np.array(self.clusters), []
        groups = list(dict.fromkeys(self.clusters))
        for _ in range(1000):
            some = [i for key in generator.choice(groups, len(groups)) for i in np.flatnonzero(keys == key)]
            drawn.append(_correlation([told[i] for i in some], [came[i] for i in some]))
        spread = null_interval(np.array([one for one in drawn if np.isfinite(one)]), unit=unit)
        estimate = Estimate(
            value=found, low=None if spread.low is None else min(spread.low, found),
            high=None if spread.high is None else max(spread.high, found), unit=unit, n=len(groups),
            method="bootstrap over prompts",
        )  # fmt: skip
        return context.claim(
            f"{name}_foretold",
            f"In {title(name)}, attribution graphs foretell what taking a feature away does to the answer: forecasts "
            f"and changes correlate by {number(found)} over {sum(map(len, told)):,} removals.",
            estimate=estimate,
            controls=[
                Control(
                    name="forecasts exchanged", estimate=null_interval(np.array(chance), unit=unit),
                    description="Each feature given the forecast of another feature of its prompt.",
                )
            ],
            p_value=null_p_value(found, np.array(chance)), test=f"place among {len(chance)} permutations",
            rule="foretold", sites=self._sites(), positions="all", chosen_on=self._note(), measured_on=self._note(),
        )  # fmt: skip

    def _note(self) -> Any:
        return self.task.note("prompts that the model gets right", self.rows)

    def _sites(self) -> list[str]:
        """The MLPs whose features were taken away on at least half of the prompts."""
        layers = [{one.graph.node(number).layer for number in one.chosen} for one in self.traced]
        every = sorted(set().union(*layers))
        often = [layer for layer in every if sum(layer in one for one in layers) * 2 >= len(layers)]
        return [f"layer.{layer}.mlp.out" for layer in often]


_SCORES = ("replacement", "completeness", "unexpanded")


def _correlation(told: list[np.ndarray], came: list[np.ndarray]) -> float:
    x, y = np.concatenate(told), np.concatenate(came)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


ATTRIBUTION_GRAPHS = Exam(
    name="circuits.attribution_graphs",
    title="What attribution graphs say, tested",
    question="Do the features that a graph calls influential carry the answer, by as much as it says?",
    run=run_graphs,
    rule={
        "influence": Rule(direction="greater", minimum=0.1),
        "foretold": Rule(direction="greater", minimum=0.2),
    },
    options=GraphOptions,
    presets={"quick": {"n": 16, "tasks": ["facts"], "draws": 99, "tested": 3}, "deep": {"n": 96}},
    applies=speaks_text,
    method=(
        "On each prompt a linear graph is made through the frozen model with transcoders in the MLPs' place; the "
        "features of most influence on the right answer are set to zero in the model, and the answer's logit, less "
        "the mean logit, is compared with what the graph foretold and with the removal of other active features."
    ),
    cost=20.0,
)
