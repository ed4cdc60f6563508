"""A deep network of digits whose first half is dead: one skip passes it by, and training never reached it.

Alain and Bengio 2016 (arXiv:1610.01644, figure 8): leaky-ReLU layers with the library's default initialisation, which
shrinks the signal from layer to layer, and one skip from the first layer's output into the middle. The gradient comes
through the skip, so the half behind it stays as it was drawn and hands on next to nothing; the network learns with the
other half. The null has the same layers and no skip, and is drawn orthogonal, so that it learns all the same: every
layer is on the only way.

How it can mislead: that the half is dead is known by construction of the skip and the shrinking, not of the weights; a
skip past a half that carries its signal would leave that half alive.

Source of the digits: scikit-learn's (UCI optical recognition of handwritten digits, 1,797 of 8 x 8).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tomoscope.model import open_model
from tomoscope.phantoms.phantom import Card, Known, Phantom, Specimen

DEPTH, SKIP, WIDTH, SLOPE = 32, 16, 64, 0.1
TRAINED, STEPS, ROWS, RATE = 1000, 800, 128, 1e-3
"""Digits that it learns from (the other 797 are the specimen's), steps, digits a step, Adam's rate."""


class Deep(nn.Module):
    """Leaky-ReLU layers; the first layer's output is added again before layer `skip`, if that is not negative."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(SLOPE)) for _ in range(DEPTH))
        self.out = nn.Linear(WIDTH, 10)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """[item, 64] pixels to [item, 10] logits."""
        first = x = self.first(x)
        for i, layer in enumerate(self.layers):
            x = layer(x + first if i == self.skip else x)
        return self.out(x)


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """[item, 64] pixels between 0 and 1, [item] labels, in the order of a seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(found.data).float()[order] / 16, torch.tensor(found.target)[order]


def trained(seed: int, *, skip: int) -> tuple[Deep, Tensor, Tensor]:
    """The network, and the digits that it was not trained on."""
    x, y = digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Deep(skip)
        if skip < 0:
            for name, parameter in net.layers.named_parameters():
                if name.endswith("weight"):
                    nn.init.orthogonal_(parameter, gain=nn.init.calculate_gain("leaky_relu", SLOPE))
                else:
                    nn.init.zeros_(parameter)
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / STEPS))
        rows = torch.randint(TRAINED, (ROWS,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()
    return net.eval().requires_grad_(False), x[TRAINED:], y[TRAINED:]


def build(seed: int) -> Specimen:
    """The network with a dead half; its data has "labelled", inputs and labels it was not trained on."""
    return _specimen(seed, SKIP, f"{DEPTH} layers, of which a skip passes the first {SKIP} by.", holds=True)


def build_alive(seed: int) -> Specimen:
    """The same layers without a skip."""
    return _specimen(seed, -1, f"{DEPTH} layers, all on the only way.", holds=False)


def _specimen(seed: int, skip: int, said: str, *, holds: bool) -> Specimen:
    net, x, y = trained(seed, skip=skip)
    known = Known("dead", {"sites": [f"layers.{i}" for i in range(SKIP)]}, holds=holds)
    return Specimen(open_model(net, example=x[:2]), Card("dead_half", seed, said, (known,)), {"labelled": (x, y)})


PHANTOMS: tuple[Phantom, ...] = (
    Phantom("dead_half", "trained", "A deep network whose first half is dead", build, build_alive),
)
"""The phantoms of depth that learned."""
