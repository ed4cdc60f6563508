"""Truth without labels: directions along which a statement and its denial differ, found from the pairs alone.

Burns et al. 2022 (arXiv:2212.03827). A *contrast pair* is one question completed once with yes and once with no. Each
side's states are centred by their own mean, which takes the words "yes" and "no" themselves out; what is left that sets
the two sides apart is a property of the pair, and truth is one.

- CCS learns p = sigmoid(w . x + b) with p(yes) near 1 - p(no) and both far from 1/2. Three algorithms go by that name:
  "paper" (Adam, 0.01, states scaled by their mean norm, start of unit norm), "reference" (the released code: AdamW,
  0.001, decay 0.01, no scaling) and "elk" (L-BFGS with decay 0.01). Restarts differ; the one of the lowest loss is kept
  and their disagreement is told.
- CRC-TPC: the first principal component of the centred differences.
- VINC (Belrose and Mallen 2023): the top eigenvector of covariance between questions minus that inside paraphrases
  minus that between yes and no; needs several templates.
- LAT (Zou et al. 2023): the first principal component of differences in random order (uncentred, so that a constant
  difference, which may be the concept itself, is not subtracted).
- `bimodality`: how two-humped the differences are along a direction (BSS, bimodal salience search): variance between
  the two halves of the best cut over the whole.

None of them knows which side is true: the loss is the same for a direction and its opposite. `Orientation` says where
the sign came from; without labelled anchors it stays undetermined, and accuracy is then told folded, as max(a, 1 - a).
How they can mislead (Farquhar et al. 2023, arXiv:2312.10029): they find the most salient property of the pairs,
whatever that is; give `distractors` what else differs, and templates of other wording.

All sites, templates and restarts are solved in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.concepts.minimise import minimise
from tomoscope.errors import DataError

Preset = Literal["paper", "reference", "elk"]
PRESETS: tuple[Preset, ...] = ("paper", "reference", "elk")


@dataclass(frozen=True, eq=False)
class Pairs:
    """States of both sides.

    Attributes:
        yes, no: [problem, item, width]; a problem is a site (or a site and template).
    """

    yes: Float[Tensor, "problem item width"]
    no: Float[Tensor, "problem item width"]

    def __post_init__(self) -> None:
        if self.yes.shape != self.no.shape or self.yes.dim() != 3:
            raise DataError(
                f"Pairs of shapes {tuple(self.yes.shape)} and {tuple(self.no.shape)}.",
                remedy="Both are [problem, item, width].",
            )
        if self.yes.shape[1] < 4:
            raise DataError(f"{self.yes.shape[1]} contrast pairs.", remedy="Give at least four.")

    def take(self, rows: Int[Tensor, " row"] | Bool[Tensor, " item"]) -> Pairs:
        """Some items."""
        return Pairs(self.yes[:, rows], self.no[:, rows])


@dataclass(frozen=True, eq=False)
class Centring:
    """Each side's mean and one common scale a problem, from training items.

    Attributes:
        yes, no: [problem, 1, width] means.
        scale: [problem, 1, 1].
    """

    yes: Tensor
    no: Tensor
    scale: Tensor

    def __call__(self, pairs: Pairs) -> Pairs:
        """Centred and scaled pairs."""
        return Pairs((pairs.yes - self.yes) / self.scale, (pairs.no - self.no) / self.scale)


def centring(pairs: Pairs, *, scaled: bool = True) -> Centring:
    """Of training pairs; scaled so that the mean norm is sqrt(width)."""
    yes, no = pairs.yes.mean(1, keepdim=True), pairs.no.mean(1, keepdim=True)
    scale = torch.ones(len(yes), 1, 1, dtype=yes.dtype)
    if scaled:
        norm = torch.cat([pairs.yes - yes, pairs.no - no], dim=1).norm(dim=-1).mean(1)
        scale = (norm / pairs.yes.shape[-1] ** 0.5).clamp(min=1e-12)[:, None, None]
    return Centring(yes, no, scale)


@dataclass(frozen=True, eq=False)
class Contrast:
    """A direction a problem, found without labels.

    Attributes:
        method: "CCS paper", "CRC-TPC", ...
        weight: [problem, width], on centred states.
        bias: [problem].
        centre: what was subtracted and divided by; None of it comes from the items that are measured.
        sign: [problem] 1 or -1; see `oriented`.
        orientation: where the sign came from.
        losses: [problem, restart]; empty for closed forms.
        agreement: [problem] mean |cosine| between the restarts' directions; 1 for closed forms.
    """

    method: str
    weight: Float[Tensor, "problem width"]
    bias: Float[Tensor, " problem"]
    centre: Centring
    sign: Float[Tensor, " problem"]
    orientation: str
    losses: Float[Tensor, "problem restart"]
    agreement: Float[Tensor, " problem"]

    def score(self, pairs: Pairs, *, transductive: bool = False) -> Float[Tensor, "problem item"]:
        """How much more yes than no: above 0 means yes is true (if the sign is right).

        Args:
            pairs: any pairs, raw.
            transductive: centre by these pairs' own means, as the released code does; not if their labels are unequal.
        """
        centred = (centring(pairs, scaled=False) if transductive else self.centre)(pairs)
        if transductive:
            centred = Pairs(centred.yes / self.centre.scale, centred.no / self.centre.scale)
        yes, no = (
            torch.einsum("piw,pw->pi", side, self.weight) + self.bias[:, None] for side in (centred.yes, centred.no)
        )
        if self.method.startswith("CCS"):
            return self.sign[:, None] * (yes.sigmoid() - no.sigmoid())
        return self.sign[:, None] * (yes - no)

    def confidence(self, pairs: Pairs) -> Float[Tensor, "problem item"]:
        """Size of the score: by it answers are abstained from."""
        return self.score(pairs).abs()

    def oriented(self, pairs: Pairs, labels: Int[Tensor, " item"], *, source: str = "labelled anchors") -> Contrast:
        """With the sign under which more of some labelled items (not those that are measured) come out right."""
        wanted = 2.0 * labels.to(self.weight) - 1
        along = (self.score(pairs).sign() * wanted).sum(1)
        sign = torch.where(along < 0, -self.sign, self.sign)
        return Contrast(
            self.method, self.weight, self.bias, self.centre, sign, source, self.losses, self.agreement
        )  # fmt: skip

    def raw(self) -> Float[Tensor, "problem width"]:
        """The direction for raw states, with its sign."""
        return self.sign[:, None] * self.weight / self.centre.scale[:, 0]


def folded(right: Float[Tensor, "problem item"]) -> Float[Tensor, " problem"]:
    """max(accuracy, 1 - accuracy): what can be said where the sign is not known."""
    mean = right.double().mean(1)
    return torch.maximum(mean, 1 - mean)


# ---- CCS


def _parts(yes: Tensor, no: Tensor) -> Tensor:
    """[...] the loss of logits [..., item]: consistency + confidence."""
    p, q = yes.sigmoid(), no.sigmoid()
    return ((p + q - 1).square() + torch.minimum(p, q).square()).mean(-1)


def ccs_loss(
    weight: Float[Tensor, "problem restart width"], bias: Float[Tensor, "problem restart"], pairs: Pairs
) -> Float[Tensor, "problem restart"]:
    """Of every problem and restart, on centred pairs."""
    yes, no = (torch.einsum("piw,prw->pri", side, weight) + bias[..., None] for side in (pairs.yes, pairs.no))
    return _parts(yes, no)


def _slopes(yes: Tensor, no: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's gradient by the logits of either side, times the number of items."""
    p, q = yes.sigmoid(), no.sigmoid()
    both = 2 * (p + q - 1)
    lower = p <= q
    return (both + 2 * p * lower) * p * (1 - p), (both + 2 * q * ~lower) * q * (1 - q)


def ccs(
    pairs: Pairs,
    *,
    preset: Preset = "paper",
    restarts: int = 10,
    steps: int = 1000,
    seed: int = 0,
) -> Contrast:
    """Contrast-consistent search for every problem.

    Args:
        pairs: training pairs, raw.
        preset: "paper", "reference" or "elk"; see the module.
        restarts: random starts of each problem.
        steps: of the optimiser.
        seed: of the starts.

    Returns:
        The restart of the lowest loss; its sign is undetermined until `oriented`.
    """
    if preset not in PRESETS:
        raise DataError(f"There is no CCS preset {preset!r}.", remedy=f"It is one of {', '.join(PRESETS)}.")
    centre = centring(pairs, scaled=preset != "reference")
    centred = centre(pairs)
    problems, _, width = centred.yes.shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(problems, restarts, width + 1, generator=generator, dtype=centred.yes.dtype)
    start = start / start.norm(dim=-1, keepdim=True)
    if preset == "reference":  # a linear layer's own start: uniform within 1 / sqrt(width)
        bound = width**-0.5
        start = (2 * torch.rand(start.shape, generator=generator, dtype=start.dtype) - 1) * bound
    theta = _adam(centred, start, preset, steps) if preset != "elk" else _quasi_newton(centred, start, steps)
    weight, bias = theta[..., :width], theta[..., width]
    losses = ccs_loss(weight, bias, centred)
    best = losses.argmin(1)
    rows = torch.arange(problems)
    unit = torch.nn.functional.normalize(weight, dim=-1)
    cosine = torch.einsum("prw,psw->prs", unit, unit).abs()
    pairs_of = restarts * (restarts - 1)
    agreement = (cosine.sum((1, 2)) - restarts) / pairs_of if restarts > 1 else torch.ones(problems)
    return Contrast(
        f"CCS {preset}", weight[rows, best], bias[rows, best], centre, torch.ones(problems, dtype=weight.dtype),
        "undetermined", losses, agreement,
    )  # fmt: skip


def _gradient(centred: Pairs, theta: Tensor) -> Tensor:
    width = centred.yes.shape[-1]
    weight, bias = theta[..., :width], theta[..., width:]
    up = torch.baddbmm(bias, weight, centred.yes.transpose(1, 2))
    down = torch.baddbmm(bias, weight, centred.no.transpose(1, 2))
    a, b = _slopes(up, down)
    body = torch.bmm(a, centred.yes) + torch.bmm(b, centred.no)
    return torch.cat([body, (a + b).sum(-1, keepdim=True)], dim=-1) / up.shape[-1]


def _adam(centred: Pairs, theta: Tensor, preset: Preset, steps: int) -> Tensor:
    """AdamW by hand: the gradient has a closed form, and no restart touches another."""
    rate, decay = (0.01, 0.01) if preset == "paper" else (0.001, 0.01)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, steps + 1):
        gradient = _gradient(centred, theta)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        size = (second / (1 - 0.999**step)).sqrt() + 1e-8
        theta = theta * (1 - rate * decay) - rate * (first / (1 - 0.9**step)) / size
    return theta


def _quasi_newton(centred: Pairs, start: Tensor, steps: int, *, decay: float = 0.01) -> Tensor:
    problems, restarts, size = start.shape
    width = size - 1

    def forward(theta: Tensor) -> Tensor:
        """[2, problem x restart, item]."""
        shaped = theta.reshape(problems, restarts, size)
        both = [
            torch.baddbmm(shaped[..., width:], shaped[..., :width], side.transpose(1, 2))
            for side in (centred.yes, centred.no)
        ]
        return torch.stack([one.reshape(problems * restarts, -1) for one in both])

    def penalty(theta: Tensor) -> Tensor:
        return decay / 2 * theta[..., :width].square().sum(-1)

    def loss(z: Tensor, theta: Tensor) -> Tensor:
        return _parts(z[0], z[1]) + penalty(theta)

    def slope(z: Tensor, theta: Tensor) -> Tensor:
        a, b = (one.reshape(problems, restarts, -1) for one in _slopes(z[0], z[1]))
        body = (torch.bmm(a, centred.yes) + torch.bmm(b, centred.no)).reshape(-1, width)
        bias = (a + b).sum(-1).reshape(-1, 1)
        items = z.shape[-1]
        return torch.cat([body / items + decay * theta[..., :width], bias / items], dim=-1)

    theta, _, _ = minimise(start.reshape(-1, size), forward, loss, slope, lambda g: g, 1e-6, min(steps, 300))
    return theta.reshape(problems, restarts, size)


# ---- closed forms


def _closed(method: str, weight: Tensor, centre: Centring) -> Contrast:
    problems = len(weight)
    bias, ones = torch.zeros(problems, dtype=weight.dtype), torch.ones(problems, dtype=weight.dtype)
    return Contrast(
        method, torch.nn.functional.normalize(weight, dim=-1), bias, centre, ones, "undetermined",
        torch.zeros(problems, 0), ones,
    )  # fmt: skip


def crc_tpc(pairs: Pairs) -> Contrast:
    """Contrastive representation clustering: the top principal component of the centred differences, cut at 0."""
    centre = centring(pairs)
    centred = centre(pairs)
    difference = centred.yes - centred.no
    return _closed("CRC-TPC", torch.linalg.svd(difference, full_matrices=False)[2][:, 0], centre)


def lat(pairs: Pairs, *, seed: int = 0, centred: bool = True) -> Contrast:
    """Linear artificial tomography: the top component of differences whose order is tossed, without subtracting a mean.

    With `centred` each side's mean is taken out first, as for the other methods; without, a constant difference of the
    sides (the concept itself, for pairs like "be honest" and "be dishonest") is kept.
    """
    zero = torch.zeros_like(pairs.yes[:, :1])
    centre = centring(pairs) if centred else Centring(zero, zero, torch.ones_like(zero[..., :1]))
    both = centre(pairs)
    generator = torch.Generator().manual_seed(seed)
    toss = 2.0 * torch.randint(0, 2, (pairs.yes.shape[1], 1), generator=generator) - 1
    difference = (both.yes - both.no) * toss.to(pairs.yes)
    weight = torch.linalg.svd(difference, full_matrices=False)[2][:, 0]
    if not centred:  # here the sides are known, and the sign with them
        along = torch.einsum("piw,pw->p", both.yes - both.no, weight).sign()
        weight = weight * torch.where(along == 0, torch.ones_like(along), along)[:, None]
    return _closed("LAT", weight, centre)


def vinc(pairs: Pairs, questions: Int[Tensor, " item"], *, variance: float = 1.0, invariance: float = 0.5) -> Contrast:
    """VINC: directions that differ between questions, not inside their paraphrases, and oppositely for yes and no.

    Args:
        pairs: training pairs of all templates.
        questions: which question each item is a paraphrase of; each at least twice.
        variance: weight of the covariance between questions.
        invariance: weight of the negative correlation of yes and no; its complement weighs the invariance to
            paraphrase.

    Raises:
        DataError: no question comes twice.
    """
    names, index = questions.unique(return_inverse=True)
    if len(names) == len(questions):
        raise DataError("VINC needs several templates of each question.", remedy="Give paraphrases, or take crc_tpc.")
    centre = centring(pairs)
    centred = centre(pairs)
    hot = torch.nn.functional.one_hot(index).to(pairs.yes)
    share = hot / hot.sum(0)
    between, inside, cross = 0.0, 0.0, 0.0
    middles = []
    for side in (centred.yes, centred.no):
        middle = torch.einsum("iq,piw->pqw", share, side)
        rest = side - torch.einsum("iq,pqw->piw", hot, middle)
        middles.append(middle)
        between = between + torch.einsum("pqw,pqv->pwv", middle, middle) / len(names) / 2
        inside = inside + torch.einsum("piw,piv->pwv", rest, rest) / side.shape[1] / 2
    half = torch.einsum("pqw,pqv->pwv", middles[0], middles[1]) / len(names)
    cross = (half + half.transpose(1, 2)) / 2
    matrix = variance * between - (1 - invariance) * inside - invariance * cross
    return _closed("VINC", torch.linalg.eigh(matrix)[1][..., -1], centre)


def bimodality(scores: Float[Tensor, "problem item"]) -> Float[Tensor, " problem"]:
    """How two-humped scores are: variance between the sides of the best cut over all (1: two points; 2/pi: normal)."""
    ordered = scores.double().sort(dim=1).values
    n = ordered.shape[1]
    sums, count = ordered.cumsum(1)[:, :-1], torch.arange(1, n, dtype=torch.float64)
    mean = ordered.mean(1, keepdim=True)
    below, above = sums / count, (ordered.sum(1, keepdim=True) - sums) / (n - count)
    between = count / n * (below - mean).square() + (n - count) / n * (above - mean).square()
    return between.amax(1) / ordered.var(1, unbiased=False).clamp(min=1e-30)
