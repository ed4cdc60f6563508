"""Adam on the float32 masters (torch's fused kernel), with decoder rows kept on the unit sphere where they are to be.

Where norms are fixed, the gradient's part along a row does nothing but disturb Adam's averages, and is removed first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.parameters import Parameters

AVERAGES = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """Adam for the parameters of one dictionary."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters, self.config = parameters, parameters.config
        self.leaves = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.named().items()}
        config: TrainConfig = self.config
        self.adam = torch.optim.Adam(
            self.leaves.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_epsilon,
            fused=True,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        """One step with these gradients (which are used up)."""
        for index, part in enumerate(self.parameters.parts):
            if self.config.decoder == "unit":
                pull = gradients[f"W_dec.{index}"]
                along = torch.linalg.vecdot(pull, part.W_dec)
                pull.addcmul_(along[:, None], part.W_dec, value=-1)
        for name, leaf in self.leaves.items():
            leaf.grad = gradients[name]
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for leaf in self.leaves.values():
            leaf.grad = None
        self.parameters.settle()

    def forget(self, name: str, rows: Tensor) -> None:
        """Forget what was averaged of some rows of a parameter (they were drawn anew)."""
        state = self.adam.state.get(self.leaves[name], {})
        for average in AVERAGES:
            if average in state:
                state[average][rows] = 0

    def tensors(self) -> dict[str, Tensor]:
        """The averages and the step count, by name."""
        out = {}
        for name, leaf in self.leaves.items():
            state = self.adam.state.get(leaf, {})
            out |= {f"{key}:{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, leaf in self.leaves.items():
            keys = [key for key in ("step", *AVERAGES) if f"{key}:{name}" in tensors]
            if keys:
                self.adam.state[leaf] = {key: tensors[f"{key}:{name}"].clone() for key in keys}
