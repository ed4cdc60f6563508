"""A GPT-2 taught two tasks in the test: what the exams must find is known by construction (see `world`)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.exams.world import TRAINED_ON, trained_subject
from tomoscope.exams import EXAMS, Context
from tomoscope.findings.verdict import correct


def examined(name: str, **options):
    exam = EXAMS[name]
    context = Context(trained_subject(), exam, options=exam.configure(options))
    return {finding.id.split("/")[1]: finding for finding in correct(list(exam.run(context)))}, context


def test_it_does_what_it_was_taught_and_nothing_else():
    found, _ = examined("observe.abilities")
    assert {name for name, finding in found.items() if finding.verdict == "confirmed"} == set(TRAINED_ON)
    assert (
        found["facts"].claim
        == "In capitals of countries, the model does better than chance: right on 100 % of 128 prompts."
    )
    assert found["facts"].estimate.n == 28  # countries, not prompts
    assert {f.verdict for name, f in found.items() if name not in TRAINED_ON} <= {"refuted", "inconclusive"}


def test_patching_finds_where_the_answer_is_and_when_it_moves():
    found, context = examined("circuits.patching", n=48)
    for name, label in (("facts", "subject"), ("gendered_pronoun", "name")):
        held = context.arrays[f"{name}_stream.values"]  # [label, layer]: the word itself, then the last token
        np.testing.assert_allclose(held, [[1, 1], [0, 0]], atol=0.01)
        arrival = found[f"{name}_arrival"]
        assert arrival.verdict == "confirmed"
        assert "block 1 brings the answer to the last token" in arrival.claim
        assert found[f"{name}_mlp"].verdict == "confirmed"
        assert (found[f"{name}_mlp"].sites, found[f"{name}_mlp"].positions) == (("layer.0.mlp.out",), label)
        head = found[f"{name}_head"]
        assert head.verdict == "confirmed"
        assert head.sites[0].startswith("layer.1.attn.z")
        assert head.positions == "end"
        apart = {control.name: control.estimate.value for control in head.controls}
        assert apart["patched from another pair"] < 0.5 * head.estimate.value
        assert found[f"{name}_linear"].verdict == "confirmed"
    assert found["ioi_head"].verdict == "not measured"
    assert "does not do this task: it is right on" in found["ioi_head"].reason


def test_noising_finds_the_same_block():
    found, _ = examined("circuits.patching", n=32, denoising=False, tasks=("facts",))
    assert found["facts_arrival"].verdict == "confirmed"
    assert "block 1" in found["facts_arrival"].claim
    assert "removes" in found["facts_head"].claim


def test_tracing_peaks_at_the_subject_before_the_fact_moves():
    found, context = examined("circuits.causal_tracing", window=1, facts=24, draws=4)
    states = context.arrays["trace_hidden.values"]  # [subject, further, last] x layer
    assert np.unravel_index(int(states[:, 0].argmax()), states[:, 0].shape) == (0,)
    assert states[:, 1].argmax() == len(states) - 1
    assert found["facts"].verdict == "confirmed"
    assert found["facts"].sites == ("layer.0.mlp.out",)
    assert found["facts_attention"].verdict == "not measured"
    assert "layer.0.attn.out" in found["facts_attention"].reason


@pytest.mark.parametrize("name", ["observe.direct_attribution", "observe.token_attribution"])
def test_attributions(name):
    found, _ = examined(name, tasks=TRAINED_ON, n=32)
    assert found["facts"].verdict == "confirmed"
    if name == "observe.direct_attribution":
        assert found["facts"].sites[0].startswith("layer.1.attn.result")  # block 0 writes nothing by attention
    else:
        assert [found[task].positions for task in ("facts", "gendered_pronoun")] == ["subject", "name"]
