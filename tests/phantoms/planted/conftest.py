"""What the planted phantoms' tests share."""

from __future__ import annotations

import pytest
import torch


def same_weights(first, second) -> bool:
    """Whether two models are equal bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["gpt2", "llama"])
def form(request) -> str:
    """The two forms of planted language models."""
    return request.param
