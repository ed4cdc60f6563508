"""Looking at a model without changing it: lenses, attribution of logits and tokens, and the roles of attention heads.

Methods here compute; they claim nothing. Each returns a small record of tensors whose axes are told in its docstring.
"""

from __future__ import annotations

from tomoscope.observe.attribution import (
    LogitAttribution,
    UnitAttribution,
    by_head,
    by_neuron,
    direct_logit_attribution,
)
from tomoscope.observe.heads import CopyingScores, HeadScores, attention_roles, copying_scores
from tomoscope.observe.lens import LensReading, logit_lens
from tomoscope.observe.name_movers import NameMoverScores, name_movers
from tomoscope.observe.token_attribution import TokenAttribution, gradient, gradient_x_input, integrated_gradients
from tomoscope.observe.tuned_lens import LensTraining, TunedLens, train_tuned_lens

__all__ = [
    "CopyingScores",
    "HeadScores",
    "LensReading",
    "LensTraining",
    "LogitAttribution",
    "NameMoverScores",
    "TokenAttribution",
    "TunedLens",
    "UnitAttribution",
    "attention_roles",
    "by_head",
    "by_neuron",
    "copying_scores",
    "direct_logit_attribution",
    "gradient",
    "gradient_x_input",
    "integrated_gradients",
    "logit_lens",
    "name_movers",
    "train_tuned_lens",
]
