"""Observing every causal architecture of the installed transformers that can be built tiny: exact, or a reason."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.observe.raw import random_ids, random_prompts
from tests.sweep import sweep
from tomoscope.errors import TomoscopeError
from tomoscope.model import open_model
from tomoscope.observe import by_head, by_neuron, direct_logit_attribution, logit_lens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_most_architectures_are_observed_exactly_and_the_others_say_why():
    prompts, answers, wrong = [row[:5] for row in random_prompts(4)], random_ids(4), random_ids(4, seed=2)
    counts: Counter[str] = Counter()
    for entry in sweep():
        if entry.model is None:
            continue
        try:
            subject = open_model(entry.model)
            counts["lens"] += float(logit_lens(subject, prompts).kl[-1].abs().max()) < 1e-4
            for name, method in (("parts", direct_logit_attribution), ("heads", by_head), ("neurons", by_neuron)):
                try:
                    error = method(subject, prompts, answers, wrong).error
                    assert error < 1e-3, (entry.model_type, name, error)
                    counts[name] += error < 1e-4
                except TomoscopeError:
                    counts[f"no {name}"] += 1
        except (TomoscopeError, RuntimeError, AttributeError):
            counts["not opened or not run"] += 1
    assert counts["lens"] >= 160, counts
    assert counts["parts"] >= 130, counts
    assert counts["heads"] >= 110, counts
    assert counts["neurons"] >= 100, counts
