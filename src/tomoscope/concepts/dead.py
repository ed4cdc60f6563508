"""Which layers of a deep network are dead: their probes fall below what went in, and noise there costs nothing.

Alain and Bengio 2016 (arXiv:1610.01644, figure 8) probed a deep network with one skip connection and found that the
half which the skip passes by stays useless. A probe's fall alone does not prove it: a layer may hold what it needs in a
form that a linear probe does not read. So the suspects are replaced by noise of their own mean and spread, and the
task is done again; the same noise in a layer that is not suspected is the control, and must hurt.

How it can mislead: layers that are only used on other inputs look dead on these; noise at one layer also replaces what
later layers read of it.

Steps: probes at every site, on one part of the items; suspects, the longest run of sites that are worse than the best
before and the best after them (what they lost is back later, so it did not come through them); on the other items,
noise at the last suspect, and at the site after. Without suspects the noise goes to the site that is worst beside the
better of its sides, so that a healthy network is seen to suffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.concepts.probes import Probes, train_probes
from tomoscope.concepts.splits import split
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
        suspects: the run of sites whose probes are worse than what comes before and after; empty where there is none.
        noised_at: the site of the noise: the last suspect, or the likeliest site without one.
        plain: [item] whether the model itself is right.
        noised: [item] whether it is with noise there.
        control: [item] whether it is with noise at the next site.
        seed: of the noise and the intervals.
    """

    probes: Probes
    suspects: tuple[str, ...]
    noised_at: str
    plain: Float[np.ndarray, " item"]
    noised: Float[np.ndarray, " item"]
    control: Float[np.ndarray, " item"]
    seed: int

    @property
    def cost(self) -> Estimate:
        """Accuracy lost to the noise."""
        return difference_interval(self.plain, self.noised, paired=True, seed=self.seed, unit="accuracy")

    @property
    def control_cost(self) -> Estimate:
        """Accuracy lost to noise at the next site."""
        return difference_interval(self.plain, self.control, paired=True, seed=self.seed, unit="accuracy")

    def dead(self, *, most: float = 0.02) -> bool:
        """Whether there are suspects and they are dead: noise costs less than `most` for sure, the control's more."""
        cost, control = self.cost, self.control_cost
        if not self.suspects or cost.high is None or control.low is None:
            return False
        return cost.high < most < control.low


def dead_layers(
    subject: Subject,
    inputs: Float[Tensor, "item ..."],
    labels: Sequence[int] | np.ndarray,
    sites: Sequence[str],
    *,
    n_classes: int,
    margin: float = 0.05,
    strength: float = 1e-2,
    seed: int = 0,
) -> DeadHalf:
    """Probe every site, and replace by noise what looks dead.

    Args:
        subject: a classifier (logits [item, class]).
        inputs: of items that the model was not trained on; half of them find suspects, half measure the noise.
        labels: their classes.
        sites: in the order of depth.
        n_classes: number of classes.
        margin: a suspect's held-out accuracy is lower than the best before and the best after by more than this.
        strength: of the probes' regularisation.
        seed: of splits and noise.

    Raises:
        DataError: fewer than three sites.
    """
    if len(sites) < 3:
        raise DataError(f"{len(sites)} sites.", remedy="Give the first one, and two layers at least.")
    truth = np.asarray(labels)
    found, measured = split(np.arange(len(truth)), share=0.5, seed=seed, labels=truth)
    states = collect(subject, [inputs[i] for i in found], list(sites), at=None)
    probes = train_probes(
        states, truth[found], n_classes, concept="class", strengths=[strength], folds=2, nulls=0, seed=seed
    )
    accuracy = probes.right.mean(1)
    short = shortfall(accuracy)
    start, length, best = 0, 0, (0, 0)
    for i, bad in enumerate(short > margin):
        start, length = (start, length + 1) if bad and length else (i, int(bad))
        best = max(best, (length, start), key=lambda pair: pair[0])
    suspects = probes.sites[best[1] : best[1] + best[0]]
    last = probes.sites.index(suspects[-1]) if suspects else 1 + int(short[1:-1].argmax())
    items, right = inputs[torch.as_tensor(measured)], torch.as_tensor(truth[measured])

    def done(site: str = "") -> np.ndarray:
        edits = []
        if site:
            value = states[site]
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(len(items), value.shape[1], generator=generator) * value.std(0) + value.mean(0)
            edits = [replace(site, drawn)]
        return (subject.run(items, edits=edits).logits.argmax(-1).cpu() == right).double().numpy()

    noised_at = probes.sites[last]
    return DeadHalf(probes, tuple(suspects), noised_at, done(), done(noised_at), done(probes.sites[last + 1]), seed)


def shortfall(accuracy: Float[np.ndarray, " site"]) -> Float[np.ndarray, " site"]:
    """By how much each site is worse than the best before and the best after it (the lesser of the two); 0 at ends."""
    before, after = np.maximum.accumulate(accuracy), np.maximum.accumulate(accuracy[::-1])[::-1]
    out = np.zeros(len(accuracy))
    out[1:-1] = np.minimum(before[:-2], after[2:]) - accuracy[1:-1]
    return out
