"""Attribution graphs of the two-hop phantom: planted features are named, and nothing else."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from tomoscope.circuits.attribution import read_neuronpedia
from tomoscope.errors import DataError
from tomoscope.exams import EXAMS, Context, examine
from tomoscope.exams.attribution_figures import graph_figure
from tomoscope.exams.attribution_graphs import transcoders_as
from tomoscope.exams.attribution_run import trace
from tomoscope.features import SparseCoder, TranscoderSet, save_transcoders
from tomoscope.phantoms import PHANTOMS

PROMPT = "The capital of France is"


@cache
def specimen(form: str, side: str = "build"):
    return getattr(PHANTOMS[f"hops_{form}"], side)(0)


def coders(one) -> TranscoderSet:
    return TranscoderSet([SparseCoder(**parts) for parts in one.data["transcoders"]])


def examined(one, **options):
    exam = EXAMS["circuits.attribution_graphs"]
    context = Context(
        one.subject, exam, options=exam.configure({"tasks": ("facts",), "n": 16, "draws": 99, "tested": 3} | options)
    )
    return {finding.id.rsplit("_", 1)[-1]: finding for finding in examine(exam, one.subject, context=context)}


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_the_planted_features_carry_the_answer_and_are_foretold(form: str) -> None:
    one = specimen(form)
    with transcoders_as(one.data["transcoders"]):
        found = examined(one)
    known = next(one.card.of("feature_circuit")).value
    influence, foretold = found["influence"], found["foretold"]
    assert influence.verdict == foretold.verdict == "confirmed", (influence.reason, foretold.reason)
    assert influence.estimate.value > 8
    assert abs(influence.controls[0].estimate.value) < 0.1
    assert {f"layer.{known[part]}.mlp.out" for part in ("early", "late")} == set(influence.sites)
    assert foretold.estimate.value > 0.95


def test_the_null_and_a_scan_without_transcoders_measure_nothing(tmp_path) -> None:
    null = specimen("gpt2", "null")
    with transcoders_as(null.data["transcoders"]):
        assert {one.verdict for one in examined(null).values()} == {"not measured"}
    (finding,) = examined(specimen("gpt2")).values()
    assert "no transcoders were given" in finding.reason
    (finding,) = examined(specimen("gpt2"), transcoders=str(tmp_path / "nowhere")).values()
    assert "no folder" in finding.reason


def test_transcoders_from_a_folder_are_the_specimen_s_own(tmp_path) -> None:
    one = specimen("gpt2")
    save_transcoders(coders(one), tmp_path / "coders")
    assert examined(one, transcoders=str(tmp_path / "coders"))["influence"].verdict == "confirmed"


def test_one_prompt_is_traced_drawn_and_kept(tmp_path) -> None:
    one = specimen("gpt2")
    traced = trace(one.subject, coders(one), PROMPT, tested=2)
    first, rest = traced.effects()
    assert first.max() < -8 < -0.1 < rest.min()
    whole, none = traced.effects(together=True)
    assert whole[0] < -8
    assert abs(none[0]) < 0.1
    told = traced.document()
    assert [row["drawn"] for row in told["taken_away"]] == [False, False, True, True]
    assert told["answer"] == " Paris"
    picture = graph_figure(traced.pruned, "France", labels={traced.chosen[0]: "says Paris"})
    nodes = picture.labels["node"]
    assert {"says Paris", "France"} <= {name.strip() for name in nodes}
    places = picture.arrays["places"]
    ends, levels = picture.arrays["ends"], places[:, 0]
    assert (levels[ends[:, 0]] < levels[ends[:, 1]]).all(), "edges go up"
    token = next(i for i, name in enumerate(nodes) if name == " France")
    early = next(
        i for i, level in enumerate(levels) if 0 < level < levels.max() and np.isclose(places[i, 1], places[token, 1])
    )
    assert [token, early] in ends.tolist(), "the country's feature stands over its token"
    paths = traced.save(tmp_path / "out")
    found = read_neuronpedia(paths[1])
    assert found.graph.n_features == int(traced.pruned.nodes[: traced.graph.n_features].sum())


def test_silent_transcoders_are_told() -> None:
    one = specimen("gpt2")
    width = one.subject.facts.d_model
    parts = {"W_enc": torch.zeros(width, 3), "W_dec": torch.zeros(3, width), "b_dec": torch.zeros(width)}
    silent = TranscoderSet([SparseCoder(**parts, b_enc=torch.full((3,), -1.0))] * one.subject.facts.n_layers)
    with pytest.raises(DataError, match="No feature"):
        trace(one.subject, silent, PROMPT)
