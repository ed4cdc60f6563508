"""One dictionary in training: a batch in, a step taken, its figures out; all of its state in tensors.

The state is parameters, Adam's averages, how long each latent has not fired, and the thresholds followed; with the
source's order a function of the step, a dictionary taken up again from its state goes on bit by bit as if it had not
stopped (on the same machine with as many threads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tomoscope.activations import Moments
from tomoscope.activations.sources import generator
from tomoscope.features.training.config import K_OF, TrainConfig
from tomoscope.features.training.gradients import compute
from tomoscope.features.training.optimiser import Optimiser
from tomoscope.features.training.parameters import Layout, Parameters
from tomoscope.features.training.start import begin, scales

SPARSE_ENOUGH = 0.04
"""Share of active latents under which entries are listed; above it dense products are faster."""
FOLLOW = 0.01
"""How fast BatchTopK's threshold for inference follows the batches' own."""
SMOOTH = 0.98


@dataclass
class Figures:
    """What is known while training.

    Attributes:
        step: steps taken.
        fvu: fraction of variance unexplained of the last batches (a running mean).
        l0: active latents a sample.
        dead: share of latents that count as dead.
        losses: of the last batch.
        rate: the learning rate.
    """

    step: int
    fvu: float
    l0: float
    dead: float
    losses: dict[str, float]
    rate: float


class DictionaryTraining:
    """One dictionary, its optimiser, and what they remember.

    Args:
        config: what it is.
        widths: of the source's sites.
        moments: of the source's sites.
    """

    def __init__(self, config: TrainConfig, widths: Mapping[str, int], moments: Mapping[str, Moments]) -> None:
        self.config, self.layout = config, Layout.of(config, widths)
        self.scale = scales(config, moments)
        self.variance = sum(moments[site].total_variance * self.scale[site] ** 2 for site in config.targets)
        self.parameters = Parameters.make(config, self.layout)
        self.optimiser = Optimiser(self.parameters)
        count = len(self.parameters.parts)
        self.idle = [torch.zeros(config.latents, dtype=torch.int64) for _ in range(count)]
        self.guess = torch.full((count,), -1.0, dtype=torch.float64)
        self.threshold = torch.full((count,), -1.0, dtype=torch.float64)
        self.running = torch.tensor([-1.0, float(config.latents), 0.0], dtype=torch.float64)  # fvu, l0, rows seen
        self.taken = 0

    # ---- inputs

    def inputs(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scaled rows: what is read and what is written, sites side by side."""
        x = self._side_by_side(values, self.config.reads)
        return x, (self._side_by_side(values, self.config.targets) if self.config.transcoder else x)

    def _side_by_side(self, values: Mapping[str, Tensor], sites: tuple[str, ...]) -> Tensor:
        scaled = [values[site].float() for site in sites]
        scaled = [v if self.scale[s] == 1 else v * self.scale[s] for v, s in zip(scaled, sites, strict=True)]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Set what starts from data."""
        begin(self.parameters, *self.inputs(values))
        self.parameters.settle()

    # ---- one step

    @torch.no_grad()
    def step(self, values: Mapping[str, Tensor]) -> Figures:
        """Take one step on a batch."""
        config, x_y = self.config, self.inputs(values)
        x, y = x_y
        dense = config.architecture not in K_OF and float(self.running[1]) > SPARSE_ENOUGH * config.latents
        dead = self._dead() if config.architecture in K_OF and config.auxk != 0 else ()
        guesses = [None if guess < 0 else guess for guess in self.guess.tolist()]
        done = compute(
            self.parameters, x, y, pressure=config.pressure(self.taken), dense=dense, guesses=guesses, dead=dead
        )
        rate = config.rate(self.taken)
        self.optimiser.step(done.gradients, rate)
        for idle, fired in zip(self.idle, done.fired, strict=True):
            idle += len(x)
            idle[fired > 0] = 0
        if config.architecture in ("batchtopk", "matryoshka"):
            self._follow(done.thresholds)
        l0 = done.entries / len(x) / len(self.idle)
        fvu = done.squared / len(x) / max(self.variance, 1e-30)
        old = float(self.running[0])
        self.running[0] = fvu if old < 0 else SMOOTH * old + (1 - SMOOTH) * fvu
        self.running[1] = l0
        self.running[2] += len(x)
        if self.taken in config.resample:
            self._resample(x, y)
        self.taken += 1
        share = float(torch.cat(self._dead()).double().mean())
        return Figures(self.taken, float(self.running[0]), l0, share, done.losses, rate)

    def _dead(self) -> list[Tensor]:
        return [idle >= self.config.dead_after for idle in self.idle]

    def _follow(self, thresholds: list[float]) -> None:
        found = torch.tensor(thresholds, dtype=torch.float64)
        self.threshold = torch.where(self.threshold < 0, found, self.threshold + FOLLOW * (found - self.threshold))
        self.guess = 0.8 * found

    def _resample(self, x: Tensor, y: Tensor) -> None:
        """Dead latents become inputs that are badly reconstructed, drawn by their squared loss (Bricken et al. 2023).

        Encoder rows get a fifth of the living rows' mean norm, biases 0; what Adam knew of them is forgotten.
        """
        config = self.config
        missed = y - self.reconstruct(x)
        chance = missed.square().sum(1).square()
        draw = generator(config.seed, "resample", self.taken)
        for index, (part, mask) in enumerate(zip(self.parameters.parts, self._dead(), strict=True)):
            which = mask.nonzero()[:, 0]
            if not len(which) or not float(chance.sum()):
                continue
            rows = torch.multinomial(chance.double(), len(which), replacement=len(which) > len(x), generator=draw)
            centred = x[rows] - self.parameters.b_dec if config.is_centred else x[rows]
            alive = part.W_enc[~mask].norm(dim=1)
            size = 0.2 * float(alive.mean()) if len(alive) else 0.2
            part.W_enc[which] = normalize(centred[:, part.read], dim=1) * size
            part.W_dec[which] = normalize(missed[rows][:, part.write], dim=1)
            part.b_enc[which] = 0
            for name in ("W_enc", "W_dec", "b_enc", *part.extras):
                self.optimiser.forget(f"{name}.{index}", which)
            for value in part.extras.values():
                value[which] = float(value[~mask].mean()) if len(alive) else 0.0
            self.idle[index][which] = 0
        self.parameters.settle()

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the dictionary makes of scaled rows, by its inference rule; dense, for small numbers of rows."""
        from tomoscope.features.training.export import scaled_coders

        out = self.parameters.b_dec.expand(len(x), -1).clone()
        if self.parameters.W_skip is not None:
            out += x @ self.parameters.W_skip.T
        for part, coder in zip(self.parameters.parts, scaled_coders(self), strict=True):
            out[:, part.write] += coder.encode(x[:, part.read]) @ coder.W_dec
        return out

    # ---- its state

    def tensors(self) -> dict[str, Tensor]:
        """All of its state."""
        own = {"guess": self.guess, "threshold": self.threshold, "running": self.running,
               "taken": torch.tensor(self.taken)}  # fmt: skip
        own |= {f"idle.{index}": idle for index, idle in enumerate(self.idle)}
        return self.parameters.named() | self.optimiser.tensors() | {f"state:{k}": v for k, v in own.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state that `tensors` gave."""
        for name, value in self.parameters.named().items():
            value.copy_(tensors[name])
        self.optimiser.load(tensors)
        self.guess, self.threshold, self.running = (
            tensors[f"state:{name}"].clone() for name in ("guess", "threshold", "running")
        )
        self.idle = [tensors[f"state:idle.{index}"].clone() for index in range(len(self.idle))]
        self.taken = int(tensors["state:taken"])
        for part in self.parameters.parts:
            part.refresh()

    def document(self) -> dict[str, Any]:
        """What a file says about it besides its tensors."""
        return {"config": self.config.document(), "scale": self.scale}
