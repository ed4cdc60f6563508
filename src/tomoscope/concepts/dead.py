"""Which layers of a deep network are dead: their probes fall below what went in, and noise there costs nothing.

Alain and Bengio 2016 (arXiv:1610.01644, figure 8) probed a deep network with one skip connection and found that the
half which the skip passes by stays useless. A probe's fall alone does not prove it: a layer may hold what it needs in a
form that a linear probe does not read. So the suspects are replaced by noise of their own mean and spread, and the
task is done again; the same noise in a layer that is not suspected is the control, and must hurt.

How it can mislead: layers that are only used on other inputs look dead on these; noise at one layer also replaces what
later layers read of it.

Steps: probes at every site; suspects, the longest run of sites that are worse than both the first and the last one
(what they lost is back at the end, so it did not come through them); noise at the last suspect, and at the site after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.concepts.probes import Probes, train_probes
from tomoscope.concepts.states import collect
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import difference_interval
from tomoscope.model import Subject, replace


@dataclass(frozen=True, eq=False)
class DeadHalf:
    """What was found.

    Attributes:
        probes: at every site, in order.
        suspects: the run of sites whose probes are worse than the first's and the last's; empty where there is none.
        plain: [item] whether the model itself is right.
        noised: [item] whether it is with noise at the last suspect; empty without suspects.
        control: [item] whether it is with noise at the first site after the suspects; empty where there is none.
        seed: of the noise and the intervals.
    """

    probes: Probes
    suspects: tuple[str, ...]
    plain: Float[np.ndarray, " item"]
    noised: Float[np.ndarray, " item"]
    control: Float[np.ndarray, " item"]
    seed: int

    @property
    def cost(self) -> Estimate:
        """Accuracy lost to noise in the suspects' place."""
        if not self.suspects:
            return Estimate.unknown("no layer is worse than the first and the last", unit="accuracy")
        return difference_interval(self.plain, self.noised, paired=True, seed=self.seed, unit="accuracy")

    @property
    def control_cost(self) -> Estimate:
        """Accuracy lost to noise in a layer that is not suspected."""
        if not len(self.control):
            return Estimate.unknown("no site comes after the suspects", unit="accuracy")
        return difference_interval(self.plain, self.control, paired=True, seed=self.seed, unit="accuracy")

    def dead(self, *, most: float = 0.02) -> bool:
        """Whether the suspects are dead: their noise costs less than `most` for sure, and the control's more."""
        cost, control = self.cost, self.control_cost
        if cost.high is None or control.low is None:
            return False
        return cost.high < most < control.low


def dead_layers(
    subject: Subject,
    inputs: Float[Tensor, "item ..."],
    labels: Sequence[int] | np.ndarray,
    sites: Sequence[str],
    *,
    n_classes: int,
    margin: float = 0.02,
    strength: float = 1e-2,
    seed: int = 0,
) -> DeadHalf:
    """Probe every site, and replace by noise what looks dead.

    Args:
        subject: a classifier (logits [item, class]).
        inputs: of items that the model was not trained on.
        labels: their classes.
        sites: in the order of depth; the first and the last are what the others are compared with.
        n_classes: number of classes.
        margin: a suspect's held-out accuracy is lower than the first's and the last's by more than this.
        strength: of the probes' regularisation.
        seed: of splits and noise.

    Raises:
        DataError: fewer than three sites.
    """
    if len(sites) < 3:
        raise DataError(f"{len(sites)} sites.", remedy="Give the first one, and two layers at least.")
    states = collect(subject, list(inputs), list(sites), at=None)
    probes = train_probes(states, labels, n_classes, concept="class", strengths=[strength], folds=2, nulls=0, seed=seed)
    accuracy = probes.right.mean(1)
    worse = accuracy < min(accuracy[0], accuracy[-1]) - margin
    start, length, best = 0, 0, (0, 0)
    for i, bad in enumerate(worse):
        start, length = (start, length + 1) if bad and length else (i, int(bad))
        best = max(best, (length, start), key=lambda pair: pair[0])
    suspects = probes.sites[best[1] : best[1] + best[0]]
    right = torch.as_tensor(np.asarray(labels))

    def done(site: str = "") -> np.ndarray:
        edits = []
        if site:
            value = states[site]
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(value.shape, generator=generator) * value.std(0) + value.mean(0)
            edits = [replace(site, drawn)]
        return (subject.run(inputs, edits=edits).logits.argmax(-1).cpu() == right).double().numpy()

    none = np.zeros(0)
    after = best[1] + best[0]
    return DeadHalf(
        probes, tuple(suspects), done(), done(suspects[-1]) if suspects else none,
        done(probes.sites[after]) if suspects and after < len(probes.sites) else none, seed,
    )  # fmt: skip
