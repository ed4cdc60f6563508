"""SHIFT: take away the features that a person (or a rule) judged irrelevant to a task, and measure what that does.

    result = shift(subject, coders, {"layer.3.resid_post": [17, 290]}, {"task": (prompts, metric), "other": ...})

A behaviour that rests on an unintended cue rests on features of that cue; a circuit shows them (`sparse_circuit`), a
judge names those that should not matter, and the model is run without them. What comes of it stands beside the same
number of other features that fire on these prompts, taken away at random: without that, any damage looks like a cure.

How it can mislead: judging features by their tokens is easy where the cue is a token, and then a list of words would do
(a critique of the original experiment); features taken away here may be needed elsewhere, so give measures of what must
stay as well. Source: Marks et al. 2024, "Sparse Feature Circuits" (arXiv:2403.19647).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.attribution.feature_effects import Coders, ordered
from tomoscope.circuits.metrics import Metric
from tomoscope.errors import DataError
from tomoscope.features import without_features
from tomoscope.model import Edit, Subject

CONTROLS = 20


@dataclass(frozen=True, eq=False)
class Shift:
    """What taking features away did.

    Attributes:
        dropped: site -> features taken away.
        before: measure -> [prompt].
        after: measure -> [prompt].
        control: measure -> [control, prompt], with as many other features taken away at each site.
    """

    dropped: dict[str, tuple[int, ...]]
    before: dict[str, Float[Tensor, " prompt"]]
    after: dict[str, Float[Tensor, " prompt"]]
    control: dict[str, Float[Tensor, "control prompt"]] = field(default_factory=dict)

    def change(self, measure: str) -> float:
        """Mean change of a measure."""
        return float((self.after[measure] - self.before[measure]).mean())

    def control_changes(self, measure: str) -> Float[Tensor, " control"]:
        """Mean change under each control."""
        return (self.control[measure] - self.before[measure]).mean(1)

    def right(self, measure: str) -> tuple[float, float]:
        """Share of prompts with the measure above 0, before and after (of a logit difference: answered rightly)."""
        return tuple(float((v[measure] > 0).double().mean()) for v in (self.before, self.after))  # ty: ignore


@torch.no_grad()
def shift(
    subject: Subject,
    coders: Coders,
    drop: Mapping[str, Sequence[int]],
    measures: Mapping[str, tuple[Any, Metric]],
    *,
    controls: int = CONTROLS,
    seed: int = 0,
) -> Shift:
    """Run a model without some features, and without as many others.

    Args:
        subject: the model.
        coders: site -> the dictionary that reads and writes it.
        drop: site -> features to take away, at every position.
        measures: name -> (prompts, metric of their last logits): what should change, and what should stay.
        controls: how many random choices of other features.
        seed: of those.

    Raises:
        DataError: a site without a dictionary, or too few other features that fire.
    """
    unknown = [site for site in drop if site not in coders]
    if unknown or not drop:
        raise DataError(f"There is no dictionary for {unknown[0]}." if unknown else "No feature is to be taken away.")
    sites = [site for site in ordered(subject, coders) if site in drop]
    dropped = {site: tuple(int(f) for f in drop[site]) for site in sites}
    before = _measured(subject, measures, [])
    after = _measured(subject, measures, [without_features(site, coders[site], dropped[site]) for site in sites])
    others = {site: _firing(subject, coders, site, measures, dropped[site]) for site in sites} if controls else {}
    for site, some in others.items():
        if len(some) < len(dropped[site]):
            raise DataError(
                f"Only {len(some)} other features fire at {site}, fewer than the {len(dropped[site])} taken away.",
                remedy="Give more prompts, or controls=0.",
            )
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    for _ in range(controls):
        edits = []
        for site in sites:
            chosen = torch.randperm(len(others[site]), generator=generator)[: len(dropped[site])]
            edits.append(without_features(site, coders[site], others[site][chosen]))
        for name, values in _measured(subject, measures, edits).items():
            rows[name].append(values)
    return Shift(dropped, before, after, {name: torch.stack(some) for name, some in rows.items() if some})


def _measured(subject: Subject, measures: Mapping[str, tuple[Any, Metric]], edits: Sequence[Edit]) -> dict[str, Tensor]:
    out = {}
    for name, (prompts, metric) in measures.items():
        batch = subject.tokens(prompts)
        out[name] = metric(subject.last_logits(batch, edits=edits), torch.arange(len(batch))).cpu()
    return out


def _firing(
    subject: Subject, coders: Coders, site: str, measures: Mapping[str, tuple[Any, Metric]], dropped: Sequence[int]
) -> Tensor:
    """Features of a site that fire on any of the prompts and are not dropped."""
    coder = coders[site]
    fires = torch.zeros(coder.n_features, dtype=torch.bool)
    for prompts, _ in measures.values():
        acts = subject.read(prompts, site)
        values = acts[site][acts.mask.cpu()]
        fires[coder.sparse(values if values.dtype == torch.float64 else values.float()).feature.unique()] = True
    fires[list(dropped)] = False
    return torch.nonzero(fires)[:, 0]
