"""Damage: how much worse a circuit is than the model, one number from a metric of each pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import KL, Metric
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError

DAMAGES = ("value", "drop", "change")


@dataclass(frozen=True, eq=False)
class Damage:
    """What counts as damage to a wiring's behaviour.

    Attributes:
        metric: of the wiring's pairs.
        kind: "value" (the metric itself: KL from the model), "drop" (how far it fell below the model's; a circuit that
            does better than the model has less than none), or "change" (how far it moved, either way).
        clean: [pair] metric of the model.
    """

    metric: Metric
    kind: str
    clean: Float[Tensor, " pair"]

    @classmethod
    def of(cls, wiring: Wiring, metric: Metric | None, kind: str | None) -> Damage:
        """KL from the model where no metric is given; "value" for KL and "change" for all others by default."""
        metric = KL(wiring.clean_logits) if metric is None else metric
        kind = ("value" if isinstance(metric, KL) else "change") if kind is None else kind
        if kind not in DAMAGES:
            raise DataError(f"The damage {kind!r} is unknown.", remedy=f"It is one of {', '.join(DAMAGES)}.")
        return cls(metric, kind, measured(metric, wiring.clean_logits).detach().cpu())

    def __call__(self, values: Float[Tensor, "*mask pair"]) -> Float[Tensor, "*mask"]:
        """The damage of masks, a mean over pairs; has a gradient where the values have."""
        if self.kind == "value":
            return values.mean(-1)
        fell = self.clean.to(values) - values
        return (fell if self.kind == "drop" else fell.abs()).mean(-1)


def measured(metric: Metric, logits: Float[Tensor, "pair vocab"]) -> Float[Tensor, " pair"]:
    """The metric of all pairs from their whole logits."""
    tokens = metric.tokens
    shown = logits if tokens is None else logits[:, tokens.to(logits.device)]
    return metric(shown, torch.arange(len(logits)))
