"""Is a part of a deep classifier dead? Its probes fall and come back, and noise in its place costs nothing.

Needs labelled inputs of the model's own task: `items`, a .safetensors file with "inputs" [item, ...] and "labels"
[item]. How it can mislead: see `concepts.dead`; a classifier of images whose first layers are wide is probed on their
flattened outputs, which a linear probe of few items reads badly.

Steps: probes of half of the items at every layer, the longest run that falls short of what comes before and after it,
noise at its end on the other half, and the same noise one layer later.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tomoscope.concepts.dead import DeadHalf, dead_layers
from tomoscope.errors import DataError
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.ready import attempt, percent
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.figures import curve
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.verdict import Rule

CLAIM = "A run of layers is dead: noise in its place costs no accuracy."
_LEAST = 64
_GIVEN: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("labelled inputs of a specimen", default=None)


@contextmanager
def labelled_as(items: tuple[Tensor, Tensor] | None) -> Generator[None]:
    """For a while, exams use these inputs and labels; None for no change."""
    token = _GIVEN.set(items if items is not None else _GIVEN.get())
    try:
        yield
    finally:
        _GIVEN.reset(token)


class DeadOptions(Options):
    """Which inputs, and which layers."""

    items: str = Field("", description='A .safetensors file with "inputs" [item, ...] and "labels" [item].')
    sites: tuple[str, ...] = Field((), description="Sites in the order of depth; the model's layers by default.")
    n: int = Field(2000, ge=_LEAST, le=10**6, description="Items, at most.")


def applies(subject: Any) -> str:
    """Why the exam cannot be run."""
    if subject.facts.kind == "decoder":
        return "the model is a decoder over tokens, and classifies nothing"
    return "" if len(layers(subject)) >= 3 else "the model has no three layers of one kind in a row"


def layers(subject: Any) -> list[str]:
    """The sites of depth: streams after blocks where the model has blocks, else the longest numbered run of modules."""
    if subject.facts.n_layers:
        return [site.name for site in subject.resolve(["layer.*.resid_post"])]
    runs: dict[str, list[str]] = {}
    for name, _ in subject.model.named_modules():
        numbered = re.fullmatch(r"((?:.*\.)?)(\d+)", name)
        if numbered:
            runs.setdefault(numbered[1], []).append(name)
    return max(runs.values(), key=len, default=[])


def read_items(path: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a file. Raises DataError where it holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(Path(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} can't be read: {error}.", remedy="Give a .safetensors file.") from error
    if not {"inputs", "labels"} <= set(found):
        raise DataError(f"{path} holds {', '.join(found) or 'nothing'}.", remedy='It needs "inputs" and "labels".')
    if found["labels"].dim() != 1 or len(found["labels"]) != len(found["inputs"]):
        raise DataError(f"{path}: labels of shape {tuple(found['labels'].shape)}.", remedy="Give one an input.")
    return found["inputs"], found["labels"].long()


def run(context: Context) -> Iterator[Finding]:
    """One claim."""
    given = _GIVEN.get()
    if given is None and not context.options.items:
        yield context.not_measured("dead", CLAIM, "no labelled inputs were given (the option `items`)")
        return
    yield attempt(context, "dead", CLAIM, lambda: _claim(context, given))


def _claim(context: Context, given: tuple[Tensor, Tensor] | None) -> Finding:
    options = context.options
    inputs, labels = read_items(options.items) if options.items else given or (torch.zeros(0), torch.zeros(0))
    inputs, labels = inputs[: options.n], labels[: options.n]
    if len(labels) < _LEAST:
        return context.not_measured("dead", CLAIM, f"{len(labels)} items, and {_LEAST} are needed")
    names = list(options.sites) or layers(context.subject)
    classes, seed = int(labels.max()) + 1, context.seed_for("dead layers") % 2**31
    found = dead_layers(context.subject, inputs, labels.numpy(), names, n_classes=classes, seed=seed)
    majority = float(np.bincount(labels.numpy()).max() / len(labels))
    if float(found.plain.mean()) < majority + 0.1:
        return context.not_measured(
            "dead", CLAIM, f"the model is right on {percent(float(found.plain.mean()))} of the items, so it has no "
            "accuracy to lose",
        )  # fmt: skip
    cost, control = found.cost, found.control_cost
    said = (
        f"Layers {found.suspects[0]} to {found.suspects[-1]} are dead: their probes fall short of what comes "
        f"before and after, and noise at the last of them costs {percent(float(cost.value or 0))} of accuracy."
        if found.suspects
        else f"A run of layers is dead: none is suspected; noise at {found.noised_at} costs "
        f"{percent(float(cost.value or 0))} of accuracy."
    )
    note = DataNote(name="labelled inputs, half A", n=len(labels) - len(found.plain))
    return context.claim(
        "dead", said, estimate=_relative(found), rule="", sites=list(found.suspects) or [found.noised_at],
        controls=[
            Control(name="noise one layer later", estimate=control, description="Accuracy lost to the same noise.")
        ],
        figures=[_figure(context, found)], chosen_on=note,
        measured_on=DataNote(name="labelled inputs, half B", n=len(found.plain)),
    )  # fmt: skip


def _relative(found: DeadHalf) -> Estimate:
    """What the noise costs, as a share of what the same noise costs one layer later."""
    unit = "share of the cost one layer later"
    lost, whole = found.plain - found.noised, found.plain - found.control
    if float(whole.mean()) < 0.1:
        return Estimate.unknown("noise costs nothing one layer later either", unit=unit)
    draws = np.random.default_rng(found.seed).integers(0, len(lost), (2000, len(lost)))
    ratios = lost[draws].mean(1) / np.maximum(whole[draws].mean(1), 1e-9)
    value = float(lost.mean() / whole.mean())
    low, high = (float(v) for v in np.quantile(ratios, [0.025, 0.975]))
    return Estimate(
        value=value, unit=unit, low=min(low, value), high=max(high, value), n=len(lost),
        method="percentile bootstrap of the ratio, 2,000 resamples",
    )  # fmt: skip


def _figure(context: Context, found: DeadHalf) -> Any:
    estimates = [found.probes.accuracy(site) for site in found.probes.sites]
    return context.figure(
        "dead",
        curve(
            {"probe": np.array([e.value for e in estimates])},
            low={"probe": np.array([e.value if e.low is None else e.low for e in estimates])},
            high={"probe": np.array([e.value if e.high is None else e.high for e in estimates])},
            title="Where the class can be read",
            caption="Share of held-out items that a linear probe of each layer tells rightly.",
            x_axis="after layer", y_axis="share right", ticks=[str(i) for i in range(len(estimates))],
            references={"the model itself": float(found.plain.mean())},
        ),
    )  # fmt: skip


DEAD = Exam(
    name="concepts.dead_layers",
    title="Layers that carry nothing",
    question="Is a part of this deep classifier passed by, so that noise could stand in its place?",
    run=run,
    rule=Rule(
        direction="less",
        reference=0.1,
        alpha=None,
        note="The reference is a tenth of what the same noise costs one layer later.",
    ),
    options=DeadOptions,
    presets={"quick": {"n": 800}},
    applies=applies,
    method=(
        "A linear probe at every layer; the longest run that is worse than the best before it and the best after it is "
        "replaced by noise of its own mean and spread (Alain and Bengio 2016)."
    ),
    cost=0.2,
)
