"""The circuit exam: what is planted is found and confirmed, what is not there is not, and its pictures can be drawn."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from tomoscope.circuits import Circuit, Graph
from tomoscope.exams import EXAMS, Context, examine
from tomoscope.exams.calibration.sources import OWN_TASKS, tasks_as, with_pairs
from tomoscope.exams.circuit_figures import circuit_figure
from tomoscope.findings.finding import FigureRef
from tomoscope.phantoms import PHANTOMS
from tomoscope.scan.figures import draw
from tomoscope.scan.graphs import EDGES

OPTIONS = {"n": 48, "draws": 8, "resamples": 4}


@cache
def examined(phantom: str, side: str):
    specimen = with_pairs(getattr(PHANTOMS[phantom], side)(0))
    tasks = ("induction",) if phantom.startswith("induction") else tuple(specimen.data[OWN_TASKS])
    with tasks_as(specimen.data.get(OWN_TASKS, {})):
        context = Context(
            specimen.subject, EXAMS["circuits.discovery"],
            options=EXAMS["circuits.discovery"].configure({**OPTIONS, "tasks": tasks}),
        )  # fmt: skip
        found = {
            f.id.rsplit("_", 1)[-1]: f for f in examine(EXAMS["circuits.discovery"], specimen.subject, context=context)
        }
    return specimen, found, context


@pytest.mark.parametrize("phantom", ["induction_gpt2", "compiled_previous_token"])
def test_a_built_in_circuit_is_confirmed_and_its_parts_are_named(phantom: str) -> None:
    specimen, found, context = examined(phantom, "build")
    circuit = found["circuit"]
    assert circuit.verdict == "confirmed", circuit.reason
    assert circuit.estimate.value > 0.75
    assert {control.name for control in circuit.controls} == {"random circuits", "other heads", "untrained scores"}
    assert found["ranking"].verdict == "confirmed", found["ranking"].reason
    known = next(k for k in specimen.card.of("circuit") if k.holds)
    named = set()
    for site in circuit.sites:
        match = re.fullmatch(r"layer\.(\d+)\.(?:attn\.z\[head=(\d+)\]|mlp\.out)", site)
        named.add(f"a{match[1]}.h{match[2]}" if match[2] else f"m{match[1]}")
    parts = {node for node in known.value["nodes"] if node[0] in "am" and any(c.isdigit() for c in node)}
    # pairs that differ in the copied token alone leave keys as they are, so what makes the keys need not be named
    assert named
    assert named <= parts
    assert "CMD" in context.logged[0]
    assert "component: edges" in circuit.method


@pytest.mark.parametrize("phantom", ["induction_gpt2", "compiled_previous_token"])
def test_nothing_is_confirmed_where_nothing_is(phantom: str) -> None:
    _, found, _ = examined(phantom, "null")
    assert {one.verdict for one in found.values()} == {"not measured"}
    assert all("does not do this task" in one.reason for one in found.values())


def test_the_figures_are_drawn() -> None:
    _, found, context = examined("induction_gpt2", "build")
    curve, picture = found["circuit"].figures
    assert curve.kind == "curve"
    assert picture.kind == "graph"
    markup = draw(picture, context.arrays, {})
    assert markup.count('class="edge') == len(context.arrays[picture.arrays["weights"]])
    for site in found["circuit"].sites:
        match = re.fullmatch(r"layer\.(\d+)\.attn\.z\[head=(\d+)\]", site)
        if match:
            assert f">a{match[1]}.h{match[2]}<" in markup
    assert "by its value" in markup
    assert "style=" not in markup
    lines = draw(curve, context.arrays, {})
    assert "random circuits" in lines
    values = context.arrays[curve.arrays["values"]]
    assert np.isfinite(values).all()


def test_a_picture_of_many_edges_says_what_is_left_out() -> None:
    from tests.circuits.graphs import graph

    model: Graph = graph("llama")
    made = circuit_figure(Circuit.whole(model), "All")
    assert len(made.arrays["weights"]) > model.n_edges  # a group's key is the input of each of its heads
    arrays = {name: np.asarray(value) for name, value in made.arrays.items()}
    reference = FigureRef(
        name="all", exam="x.y", kind="graph", title=made.title, caption=made.caption, labels=dict(made.labels),
        axes=dict(made.axes), arrays={name: name for name in arrays},
    )  # fmt: skip
    markup = draw(reference, arrays, {})
    if len(arrays["weights"]) > EDGES:
        assert f"The {EDGES} largest of {len(arrays['weights']):,} edges are drawn." in markup
    assert markup.count('class="edge') == min(EDGES, len(arrays["weights"]))
    empty = circuit_figure(Circuit.of_edges(model, []), "None")
    arrays = {name: np.asarray(value) for name, value in empty.arrays.items()}
    assert "logits" in draw(reference.model_copy(update={"labels": dict(empty.labels)}), arrays, {})
