"""The sweep's own reach: most causal architectures of the installed transformers can be built tiny here."""

from __future__ import annotations

import pytest

from tests.sweep import build, causal_types, sweep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_at_least_166_causal_architectures_are_built_tiny():
    refused = {entry.model_type: entry.reason for entry in sweep() if entry.model is None}
    assert len(causal_types()) - len(refused) >= 166, refused
    assert all(refused.values())


@pytest.mark.filterwarnings("ignore")
def test_a_build_is_seeded_and_tells_why_it_is_refused():
    first, second = build("starcoder2"), build("starcoder2")
    assert first.model is not None
    assert first.reason == ""
    assert all((a == b).all() for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    missing = build("blt")
    assert (missing.model is None) == bool(missing.reason)
