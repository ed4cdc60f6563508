# ruff: noqa: E501
"""A realistic run made of numbers drawn from a seed: what a scan of a 12-layer model looks like, for the report's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tests.dummies import DummySubject
from tomoscope.exams import Context, Exam, Options
from tomoscope.exams.registry import Registry
from tomoscope.findings import (
    Control,
    DataNote,
    Estimate,
    Ledger,
    Rule,
    Treatment,
    bootstrap_interval,
    figures,
    null_interval,
    null_p_value,
    permutation_test,
)
from tomoscope.findings.calibration import CalibrationRow, CalibrationTable, Tally
from tomoscope.findings.finding import Finding
from tomoscope.scan import parse_protocol, plan, run_scan

TOKENS = [
    "When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " store",
    ",",
    " John",
    " gave",
    " a",
    " drink",
    " to",
]
LAYERS, HEADS = 12, 12


class PatchOptions(Options):
    prompts: int = Field(default=64, ge=8, description="Pairs of prompts.")
    wide: bool = False


def run_patching(context: Context) -> Iterator[Finding]:
    rng = context.rng("grid")
    layer, position = np.mgrid[0:LAYERS, 0 : len(TOKENS)]
    grid = 0.9 / (1 + np.exp((layer - 7) * 1.3)) * (position == 9) + 0.95 / (1 + np.exp((7.5 - layer) * 1.3)) * (
        position == 13
    )
    grid = grid + rng.normal(0, 0.025, grid.shape)
    grid[0, 0] = np.nan
    picture = context.figure(
        "streams",
        figures.heatmap(
            grid, rows=range(LAYERS), columns=TOKENS, title="Restored logit difference.", marks=[(4, 9), (10, 13)],
            caption="Each cell: the residual stream of one layer and token, patched from the clean into the corrupted run. "
            "1 restores the clean answer, 0 changes nothing.", value_axis="restored",
        ),
    )  # fmt: skip
    per_prompt = rng.normal(0.84, 0.12, context.options.prompts // 2)
    others = rng.normal(0.01, 0.03, 400)
    half = DataNote(name="indirect object identification, half B", n=len(per_prompt))
    yield context.claim(
        "stream",
        "Up to layer 6 the answer is decided by the second mention of the subject, and from layer 8 on by the last token.",
        estimate=bootstrap_interval(per_prompt, seed=context.seed_for("interval"), unit="restored logit difference"),
        controls=[
            Control(name="other positions", estimate=null_interval(others), description="The same layers, other tokens."),
            Control(name="unrelated prompt", estimate=bootstrap_interval(rng.normal(0.05, 0.2, 32), seed=1)),
        ],
        p_value=null_p_value(float(per_prompt.mean()), others), test="against 400 draws of other positions",
        chosen_on=DataNote(name="indirect object identification, half A", n=32, hash="ab" * 32), measured_on=half,
        sites=["layer.4.resid_post", "layer.10.resid_post"], positions="second subject; last", figures=[picture],
    )  # fmt: skip
    heads = rng.normal(0, 0.02, (LAYERS, HEADS))
    for (row, column), value in {
        (9, 9): 0.31,
        (9, 6): 0.24,
        (10, 0): 0.18,
        (7, 3): 0.12,
        (10, 7): -0.29,
        (11, 10): -0.2,
    }.items():
        heads[row, column] = value
    grid_of_heads = context.figure(
        "heads",
        figures.heatmap(
            heads, rows=range(LAYERS), columns=range(HEADS), column_axis="head", value_axis="restored",
            title="Every head, at the last token.", caption="Two heads push against the answer.", marks=[(9, 9), (9, 6)],
        ),
    )  # fmt: skip
    weak = rng.normal(0.06, 0.2, context.options.prompts // 2)
    yield context.claim(
        "head",
        "Heads 9.9 and 9.6 together carry more of the answer than any two random heads of the same layers.",
        estimate=bootstrap_interval(weak, seed=3, unit="restored logit difference"),
        controls=[Control(name="random pairs of heads", estimate=null_interval(rng.normal(0.0, 0.03, 200)))],
        p_value=permutation_test(weak, np.zeros_like(weak), seed=2, paired=True), measured_on=half, rule="small",
        sites=["layer.9.attn.z[head=9]", "layer.9.attn.z[head=6]"], positions="last", figures=[grid_of_heads],
        treatments=[Treatment(name="ablate both heads", edit='zero("layer.9.attn.z[head=9]")')],
    )  # fmt: skip
    if context.options.wide:
        wide = rng.normal(0, 0.05, (48, 1024)).cumsum(1) / 10
        big = context.figure("wide", figures.heatmap(wide, title="A long prompt.", caption="48 layers, 1,024 tokens."))
        yield context.claim(
            "long", "On a long prompt nothing before token 900 matters.", measured_on=half, rule="small", figures=[big],
            estimate=bootstrap_interval(rng.normal(-0.2, 0.05, 30), seed=5, unit="restored logit difference"),
            controls=[Control(name="random tokens", estimate=null_interval(rng.normal(0, 0.02, 99)))], p_value=0.81,
        )  # fmt: skip


def run_lens(context: Context) -> Iterator[Finding]:
    rng = context.rng("lens")
    x = np.arange(LAYERS + 1)
    tuned = 7.5 * np.exp(-x / 4.2) + 0.05
    logit = 9.5 * np.exp(-((x / 8.5) ** 2.2)) + 0.1
    bands = {"logit lens": 0.5, "tuned lens": 0.3}
    series = {"logit lens": logit, "tuned lens": tuned}
    picture = context.figure(
        "curves",
        figures.curve(
            series, low={k: series[k] - w for k, w in bands.items()}, high={k: series[k] + w for k, w in bands.items()},
            title="Distance to the final answer.", caption="KL divergence of each layer's reading to the model's own "
            "distribution, with 95 % intervals over documents.", x_axis="layer", y_axis="nats",
            references={"unigram": 6.1},
        ),
    )  # fmt: skip
    difference = rng.normal(2.1, 0.8, 40)
    yield context.claim(
        "tuned", "The tuned lens reads the middle layers better than the logit lens does.",
        estimate=bootstrap_interval(difference, seed=2, unit="nats"),
        controls=[Control(name="translator of another layer", estimate=Estimate(value=0.3, low=0.1, high=0.5, n=40))],
        p_value=permutation_test(difference, np.zeros(40), seed=0, paired=True), figures=[picture],
        measured_on=DataNote(name="held-out text", n=40), sites=["layer.*.resid_post"], positions="all",
    )  # fmt: skip
    values = rng.normal(0, 1, len(TOKENS)) * 0.6
    values[[1, 9]] = (2.4, -1.9)
    said = context.figure(
        "words", figures.tokens(TOKENS, values, title="Which tokens the answer leans on.", value_axis="logits")
    )
    rows = {
        "layer": [0, 4, 8, 12],
        "top token": [" the", " them", " John", " Mary"],
        "probability": [0.031, 0.08, 0.33, 0.71],
    }
    listed = context.figure("readings", figures.table(rows, title="What the lens reads at the last token."))
    yield context.claim(
        "early", "The answer can be read from layer 4 already.", figures=[said, listed, picture],
        estimate=bootstrap_interval(rng.normal(0.08, 0.04, 40), seed=2, unit="probability"),
        controls=[Control(name="wrong name", estimate=Estimate(value=0.07, low=0.05, high=0.1, n=40))], p_value=0.38,
        measured_on=DataNote(name="held-out text", n=40), rule="early", positions="last",
    )  # fmt: skip


def run_attention(context: Context) -> Iterator[Finding]:
    rng = context.rng("patterns")
    n = len(TOKENS)
    patterns = np.tril(rng.gamma(0.4, 1, (6, n, n)))
    patterns[:, :, 0] += 2.5
    for head, shift in ((1, 1), (2, 8), (3, 7)):
        for query in range(shift, n):
            patterns[head, query, query - shift] += 14
    patterns /= patterns.sum(-1, keepdims=True)
    heads = ["0.1", "2.2 previous token", "5.5 induction", "6.9 induction", "9.9 name mover", "11.10"]
    picture = context.figure(
        "patterns", figures.attention(patterns, tokens=TOKENS, heads=heads, title="Six heads on one prompt.")
    )
    scores = np.sort(rng.beta(1.2, 12, 18))[::-1]
    scores[:3] = (0.91, 0.74, 0.52)
    bars = context.figure(
        "scores",
        figures.bars(
            scores, labels=[f"head {i}.{(i * 7) % 12}" for i in range(18)], low=scores - 0.04, high=scores + 0.04,
            title="Induction score.", caption="Attention from the second occurrence to the token after the first.",
            value_axis="attention", references={"random tokens": 0.06}, marks=[0, 1, 2],
        ),
    )  # fmt: skip
    yield context.claim(
        "induction", "Three heads attend from a repeated token to what followed it before.",
        estimate=bootstrap_interval(rng.normal(0.72, 0.1, 50).clip(0, 1), seed=0, unit="attention"),
        controls=[Control(name="random tokens", estimate=Estimate(value=0.06, low=0.04, high=0.08, n=50))], p_value=0.001,
        chosen_on=DataNote(name="repeated random tokens, half A", n=50), figures=[bars, picture],
        measured_on=DataNote(name="repeated random tokens, half B", n=50), sites=["layer.5.attn.pattern[head=5]"],
    )  # fmt: skip
    context.log("2 of 102 prompts were left out: a name was not one token.")


def example_calibration() -> CalibrationTable:
    """What another version of the patching exam did on phantoms: badly, so that the report has to say so."""

    def share(value: float, low: float, high: float) -> Estimate:
        return Estimate(value=value, low=low, high=high, n=20, method="Wilson interval")

    row = CalibrationRow(
        exam="circuits.patching", signature="another", sensitivity=share(0.4, 0.22, 0.61),
        specificity=share(0.98, 0.91, 1.0), located=Estimate.unknown("no phantom knows the place"),
        area=share(0.81, 0.66, 0.9), planted=Tally(specimens=20, claims=20, right=8, not_measured=3),
        nulls=Tally(specimens=60, claims=60, right=59), sources={"induction_gpt2": 40, "untrained": 40},
    )  # fmt: skip
    return CalibrationTable(rows=(row,))


def example_registry() -> Registry:
    rule = Rule(minimum=0.2)
    made = Registry(modules=())
    for exam in (
        Exam(
            name="circuits.patching", title="Activation patching", run=run_patching, options=PatchOptions,
            question="Where, and at which tokens, does the model carry the indirect object?",
            rule={"": rule, "small": Rule(minimum=0.02)}, presets={}, calibration=example_calibration(),
            method="Streams of the clean run are written into the corrupted run, one layer and token at a time.",
        ),
        Exam(
            name="observe.lens", title="Logit lens and tuned lens", run=run_lens, rule={"": rule, "early": Rule(minimum=0.1)},
            question="From which layer on can the model's answer be read?", method="Each layer's stream is unembedded.",
        ),
        Exam(
            name="observe.attention", title="Attention heads and their roles", run=run_attention, rule=rule,
            question="Which heads find earlier occurrences of a token?",
        ),
        Exam(
            name="observe.gender", title="Gendered pronouns", run=run_attention, rule=rule,
            question="Does the model follow the gender of a name in its pronouns?",
            applies=lambda subject: "only 3 of the task's names are single tokens in this tokenizer; the task needs 16",
        ),
        Exam(name="observe.broken", title="Token attributions", run=_broken, rule=rule, question="Which tokens matter?"),
    ):  # fmt: skip
        made.register(exam)
    return made


def _broken(context: Context) -> Iterator[Finding]:
    raise RuntimeError("the completeness error of 0.31 exceeds 0.05 at 64 steps")
    yield


def example_run(folder: Path, *, wide: bool = False, **options: Any) -> Ledger:
    exams = example_registry()
    protocol = parse_protocol(
        'name = "standard"\ndescription = "Every exam with its default options."\n'
        '[[exam]]\nname = "circuits.*"\n[[exam]]\nname = "observe.*"\n', where="example",
    )  # fmt: skip
    steps = plan(protocol, options={"circuits.patching": {"wide": wide}}, exams=exams)
    subject = options.pop("subject", None) or DummySubject(name="example/gpt2-small")
    return run_scan(
        subject, protocol, steps, out=folder, base_command="tomoscope scan example/gpt2-small",
        command="tomoscope scan example/gpt2-small --out runs/example", passed={"model": "example/gpt2-small"},
        defaulted={"protocol": "standard", "seed": 0, "budget": None}, **options,
    )  # fmt: skip
