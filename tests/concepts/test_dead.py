"""The bypassed half of a deep network with a skip, on scikit-learn's digits, trained in seconds."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tomoscope.concepts.dead import dead_layers
from tomoscope.errors import DataError
from tomoscope.model import build_subject

DEPTH, SKIP, WIDTH = 20, 14, 32


class Deep(nn.Module):
    """Leaky-ReLU layers; with `skip` the input's layer is added again half way."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1)) for _ in range(DEPTH))
        self.out = nn.Linear(WIDTH, 10)
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.first(x)
        for i, layer in enumerate(self.layers):
            x = layer(x + first if i == self.skip else x)
        return self.out(x)


def trained(skip: int, steps: int = 150) -> tuple[object, torch.Tensor, torch.Tensor]:
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deep(skip)
        for layer in model.layers:
            nn.init.normal_(layer[0].weight, std=0.6 * WIDTH**-0.5)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[:1200]), y[:1200]).backward()
            optimiser.step()
    return build_subject(model.eval(), name="deep"), x[1200:], y[1200:]


def test_the_bypassed_half_is_suspected_and_not_called_dead_while_noise_there_still_costs():
    subject, x, y = trained(skip=SKIP)
    sites = ["first", *(f"layers.{i}" for i in range(DEPTH))]
    found = dead_layers(subject, x, y.numpy(), sites, n_classes=10)
    assert found.plain.mean() > 0.8
    assert found.suspects[-1] == f"layers.{SKIP - 1}", found.probes.right.mean(1)
    # trained by Adam for 150 steps, the half still carries something: noise costs, but far less than after it
    assert found.control_cost.low > 0.3
    assert found.cost.value < found.control_cost.low
    assert not found.dead(most=0.03)
    with pytest.raises(DataError, match="sites"):
        dead_layers(subject, x, y.numpy(), sites[:2], n_classes=10)
