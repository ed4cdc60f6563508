"""How much: the behaviour's rise and the text's loss over doses, beside random directions, and a rule that chooses.

    curve = dose_curve(subject, [direction], doses=(0.5, 1, 2, 4), effect=effect, texts=held_out)
    dose = choose_dose(curve, DoseRule(most_loss=0.1))

For each dose: the effect on every item (any function of the edits, so that any behaviour can be measured), the loss of
the steered model on held-out text, how far its next-token distribution has moved there (KL), how much its own
continuations repeat themselves, and the same effect for random directions of equal norm. The rule is declared before
the curve is seen; choose on validation items and measure on others. How it can mislead: a mean that rises can hide
items that fall, so `slopes` gives every item's own and the share that moves the wrong way (Tan et al. 2024,
arXiv:2407.12404); perplexity on neutral text does not see a model that is fluent and wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.concepts.direction import Direction
from tomoscope.errors import DataError
from tomoscope.findings.control import random_directions
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, difference_interval
from tomoscope.model import Edit, Subject, add
from tomoscope.treat.steer import steering

Effect = Callable[[Sequence[Edit]], Float[np.ndarray, " item"]]
"""Edits -> how strongly each item shows the behaviour (log-odds of the answer that does, say)."""


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """What each dose does.

    Attributes:
        doses: in units of the directions' `shift`; the first is 0.
        effect: [dose, item].
        random: [dose, draw, item] the same for random directions of equal norm.
        loss: [dose, text] nats a token of held-out text.
        kl: [dose, text] nats a token between the unsteered next-token distribution and the steered one.
        repetition: [dose, text] share of a continuation's token pairs that have stood in it before.
        random_loss: [dose, draw] mean loss under random directions.
        prompting: [item] the effect of asking for the behaviour in words instead, where that was measured.
        clusters: [item] sources, or none.
        seed: of the draws.
    """

    doses: tuple[float, ...]
    effect: Float[np.ndarray, "dose item"]
    random: Float[np.ndarray, "dose draw item"]
    loss: Float[np.ndarray, "dose text"]
    kl: Float[np.ndarray, "dose text"]
    repetition: Float[np.ndarray, "dose text"]
    random_loss: Float[np.ndarray, "dose draw"]
    prompting: Float[np.ndarray, " item"] | None
    clusters: Sequence[Any] | None
    seed: int

    def rise(self, dose: float) -> Estimate:
        """Mean rise of the effect over no dose, with its interval."""
        i = self._at(dose)
        return difference_interval(
            self.effect[i], self.effect[0], paired=True, clusters=self.clusters, seed=self.seed, unit="effect"
        )

    def over_random(self, dose: float) -> Estimate:
        """Rise of the effect less the mean rise under random directions."""
        i = self._at(dose)
        return difference_interval(
            self.effect[i], self.random[i].mean(0), paired=True, clusters=self.clusters, seed=self.seed, unit="effect"
        )

    def damage(self, dose: float) -> Estimate:
        """Rise of the loss on held-out text, nats a token."""
        return bootstrap_interval(self.loss[self._at(dose)] - self.loss[0], seed=self.seed, unit="nats a token")

    def slopes(self) -> Float[np.ndarray, " item"]:
        """Least-squares slope of each item's effect over the doses."""
        doses = np.asarray(self.doses) - np.mean(self.doses)
        return doses @ self.effect / (doses @ doses)

    def wrong_way(self) -> float:
        """Share of the items whose slope is against the mean's."""
        slopes = self.slopes()
        return float((np.sign(slopes) == -np.sign(slopes.mean())).mean())

    def _at(self, dose: float) -> int:
        if dose not in self.doses:
            raise DataError(f"The dose {dose:g} was not measured.", remedy=f"There are {self.doses}.")
        return self.doses.index(dose)


@dataclass(frozen=True)
class DoseRule:
    """Which dose counts as the right one, declared before the curve is seen.

    Attributes:
        most_loss: the mean loss on held-out text may rise by at most so many nats a token.
        beats_random: the whole interval of effect less random directions' must lie above 0.
        most_wrong: at most this share of items may move against the mean.
    """

    most_loss: float = 0.1
    beats_random: bool = True
    most_wrong: float = 0.5

    def sentence(self) -> str:
        """In words, for the record."""
        random = ", and it moves more than random directions of its norm do" if self.beats_random else ""
        return (
            f"the dose of the largest mean effect among those that raise the loss on held-out text by at most "
            f"{self.most_loss:g} nats a token{random}, with at most {self.most_wrong:.0%} of the items moving the "
            "other way"
        )


def choose_dose(curve: DoseCurve, rule: DoseRule | None = None) -> float:
    """The dose that the rule takes; 0 where no dose keeps it."""
    rule = rule or DoseRule()
    best, most = 0.0, 0.0
    for dose in curve.doses[1:]:
        rise = curve.rise(dose).value or 0.0
        damage = curve.damage(dose).value
        moved = curve.effect[curve._at(dose)] - curve.effect[0]
        wrong = float((moved < 0).mean())
        if damage is None or damage > rule.most_loss or wrong > rule.most_wrong or rise <= most:
            continue
        if rule.beats_random and not (curve.over_random(dose).low or 0.0) > 0:
            continue
        best, most = dose, rise
    return best


def dose_curve(
    subject: Subject,
    directions: Sequence[Direction],
    *,
    doses: Sequence[float],
    effect: Effect,
    texts: Sequence[Any],
    prompts: Sequence[Any] = (),
    at: Any = None,
    draws: int = 5,
    new_tokens: int = 16,
    prompting: Float[np.ndarray, " item"] | None = None,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DoseCurve:
    """Measure every dose.

    Args:
        subject: a decoder.
        directions: written together.
        doses: in units of their `shift`; 0 is added.
        effect: see `Effect`.
        texts: held-out text for loss and KL, each two tokens or more.
        prompts: continued to see repetition; none leaves it out (NaN).
        at: positions of the effect's edits; in text and continuations steering is at every token.
        draws: random directions of equal norm.
        new_tokens: of the continuations.
        prompting: the effect of asking in words, as a baseline.
        clusters: a key an item of the effect.
        seed: of the random directions.
        progress: called with (doses done, doses).
    """
    if not directions or not doses:
        raise DataError("Steering needs a direction and a dose.", remedy="Give at least one of each.")
    doses = (0.0, *sorted({float(dose) for dose in doses} - {0.0}))
    drawn = []
    for i, one in enumerate(directions):
        assert one.shift is not None
        drawn.append(random_directions(one.shift.double().numpy(), n=draws, seed=seed + i))

    def made(dose: float, draw: int = -1, where: Any = None) -> list[Edit]:
        if dose == 0.0:
            return []
        if draw < 0:
            return steering(directions, dose, at=where)
        return [
            add(one.site, torch.from_numpy(vectors[draw]).float(), dose, at=where)
            for one, vectors in zip(directions, drawn, strict=True)
        ]

    effects, randoms, losses, kls, repeats, random_losses = [], [], [], [], [], []
    plain = list(_next_tokens(subject, texts, []))
    for done, dose in enumerate(doses, start=1):
        effects.append(np.asarray(effect(made(dose, where=at)), dtype=float))
        randoms.append(np.stack([np.asarray(effect(made(dose, k, at)), dtype=float) for k in range(draws)])
                       if draws else np.empty((0, len(effects[0]))))  # fmt: skip
        loss, kl = _text_cost(subject, texts, plain, made(dose))
        losses.append(loss)
        kls.append(kl)
        random_losses.append([float(_text_cost(subject, texts, plain, made(dose, k))[0].mean()) for k in range(draws)])
        repeats.append(_repetition(subject, prompts, made(dose), new_tokens))
        if progress is not None:
            progress(done, len(doses))
    return DoseCurve(
        doses, np.stack(effects), np.stack(randoms), np.stack(losses), np.stack(kls), np.stack(repeats),
        np.asarray(random_losses).reshape(len(doses), draws), prompting, clusters, seed,
    )  # fmt: skip


_BATCH = 16


def _next_tokens(subject: Subject, texts: Sequence[Any], edits: Sequence[Edit]):
    """Batches of (log-probabilities [row, position, vocab], next ids, mask of positions that have one)."""
    encoded = list(subject.tokens(list(texts)).prompts)
    for start in range(0, len(encoded), _BATCH):
        run = subject.run(encoded[start : start + _BATCH], edits=edits)
        assert run.batch.input_ids is not None
        mask = run.batch.mask.cpu()
        yield (
            run.logits[:, :-1].float().cpu().log_softmax(-1), run.batch.input_ids[:, 1:].cpu(),
            mask[:, :-1] & mask[:, 1:],
        )  # fmt: skip


def _text_cost(
    subject: Subject, texts: Sequence[Any], plain: Sequence[tuple[Tensor, Tensor, Tensor]], edits: Sequence[Edit]
) -> tuple[np.ndarray, np.ndarray]:
    loss, kl = [], []
    for (said, ids, mask), (before, _, _) in zip(_next_tokens(subject, texts, edits), plain, strict=True):
        count = mask.sum(1).clamp(min=1)
        loss.append((-said.gather(-1, ids[..., None])[..., 0] * mask).sum(1) / count)
        kl.append(((before.exp() * (before - said)).sum(-1) * mask).sum(1) / count)
    return torch.cat(loss).double().numpy(), torch.cat(kl).double().numpy()


def _repetition(subject: Subject, prompts: Sequence[Any], edits: Sequence[Edit], new_tokens: int) -> np.ndarray:
    if not prompts:
        return np.full(1, np.nan)
    from tomoscope.model.generation import generate_tokens

    shares = []
    for row in generate_tokens(subject, list(prompts), max_new_tokens=new_tokens, edits=edits):
        pairs = list(itertools.pairwise(row))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return np.asarray(shares)
