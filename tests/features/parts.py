"""What the tests of dictionaries share: seeded tensors, small dictionaries, the embedded model and some of its text."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tomoscope.features import SparseCoder, TopK
from tomoscope.model import EMBEDDED, Subject, open_model
from tomoscope.phantoms.world import corpus, shipped_world


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def coder(d: int = 6, f: int = 10, **changes: Any) -> SparseCoder:
    parts = {"W_enc": normal(d, f), "W_dec": normal(f, d), "b_enc": normal(f), "b_dec": normal(d)}
    return SparseCoder(**{**parts, **changes})


@cache
def embedded() -> Subject:
    return open_model(EMBEDDED)


@cache
def texts(n: int = 24, seed: int = 5) -> tuple[str, ...]:
    return tuple(islice(corpus(shipped_world(), seed=seed), n))


@cache
def trained_coder(site: str = "layer.3.resid_post", f: int = 256, k: int = 12, steps: int = 60) -> SparseCoder:
    """A dictionary that was trained a little on the embedded model: plain autograd, nothing of the library's."""
    x = torch.cat([acts[site][acts.mask] for acts in embedded().stream(texts(48, 9), site)]).float()
    mean, scale = x.mean(0), x.std()
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(f, x.shape[1]), dim=-1))
    E = torch.nn.Parameter(W.detach().T.clone())
    optimiser = torch.optim.Adam([W, E], lr=3e-3)
    for _ in range(steps):
        z = (x[torch.randint(len(x), (512,))] - mean) / scale
        codes = TopK(k)(z @ E)
        loss = (codes @ W - z).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return SparseCoder(
            E.detach() / scale, W.detach() * scale, torch.zeros(f), mean, TopK(k), centred=True, reads=site,
            writes=site, name="small",
        )  # fmt: skip
