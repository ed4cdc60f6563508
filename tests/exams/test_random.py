"""Specificity: on untrained models no claim about tasks, heads or patching is confirmed more often than alpha says."""

from __future__ import annotations

import pytest

from tests.exams.world import random_subject
from tomoscope.exams import EXAMS, Context
from tomoscope.findings import wilson_interval
from tomoscope.findings.verdict import correct

EXAMINED = (
    "observe.abilities", "observe.head_roles", "observe.direct_attribution", "observe.token_attribution",
    "circuits.patching", "circuits.discovery", "circuits.causal_tracing",
)  # fmt: skip
FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3", "opt", "gemma2", "bloom", "granite")


def confirmed(family: str, seed: int) -> list[str]:
    """What a scan of an untrained model confirms, corrected over all its claims, as the runner does."""
    subject, shared, found = random_subject(family, seed), {}, []
    for name in EXAMINED:
        exam = EXAMS[name]
        options = exam.configure(dict(exam.presets.get("quick", {})))
        found += exam.run(Context(subject, exam, options=options, scan_seed=seed, shared=shared))
    assert any(finding.p_value is not None for finding in found)
    return [finding.id for finding in correct(found) if finding.verdict == "confirmed"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_nothing_is_confirmed_on_an_untrained_model(family):
    assert confirmed(family, 0) == []


@pytest.mark.slow
def test_false_confirmations_over_many_untrained_models():
    scans = {(family, seed): confirmed(family, seed) for family in FAMILIES for seed in range(8)}
    wrong = {key: ids for key, ids in scans.items() if ids}
    share = wilson_interval(len(wrong), len(scans), unit="share of scans")
    assert share.low is not None
    assert share.low <= 0.05, (share, wrong)
