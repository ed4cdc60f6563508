"""Which heads and neurons bring a behaviour about, found so that they can be taken out.

    cause = find_cause(subject, ill, well)     # Choices with the trigger, and without
    cause.heads, cause.neurons, cause.curve
    with cause.treatment.applied(subject): ...

`ill` are prompts at which the model says what it should not, `well` those that must stay as they are. Zeroing a part
moves the margin (the wanted answer's logit less the unwanted one's) by about -gradient . activation: one forward and
one backward give that for all heads and neurons together. The estimate proposes candidates by what zeroing them mends
on `ill`, less what it spoils on `well`; each is then taken out in truth, and ranked by what that did. Ever more of them
are taken out together on prompts that were not ranked on, and the fewest are kept that do nearly as much as the best
number does.

How it can mislead: a part that works only together with others is proposed late (the measured curve shows it). A part
that is used elsewhere is not seen to be: measure abilities that `well` does not hold.
Source: attribution patching, Nanda 2023 and Syed et al. 2023 (arXiv:2310.10348), with zero as the corruption.

Steps: margins and gradients on one half; propose; take each candidate out; rank; take out 1, 2, 4, ... on the other
half; choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.model import Batch, Edit, Subject, project_out, zero
from tomoscope.treat.remove import remove_parts
from tomoscope.treat.treatment import Treatment

SIZES = (1, 2, 4, 8, 16, 32, 64)
SPOILED = 2.0
"""How much more a logit of margin lost on `well` counts than one gained on `ill`."""
ALLOWED = 0.02
"""Share of `well` that may be lost."""
NEARLY = 0.98
"""Of what the best number of parts mends."""
CANDIDATES = 32
"""Parts that are taken out one by one, of those that the estimate proposes."""
AT_A_TIME = 32


Part = tuple[str, tuple[int, int], float]
"""("head" or "neuron", (layer, number), score)."""


@dataclass(frozen=True)
class Choices:
    """Prompts with the answer that is wanted and the one that is not, of which the first tokens are compared.

    Attributes:
        prompts: texts.
        wanted: with their space.
        unwanted: likewise.
    """

    prompts: tuple[str, ...]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.wanted) == len(self.unwanted) or not self.prompts:
            raise DataError(
                f"{len(self.prompts)} prompts, {len(self.wanted)} wanted and {len(self.unwanted)} unwanted answers.",
                remedy="Give one of each an item, and at least one item.",
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Choices:
        """Some items."""
        return Choices(*(tuple(part[i] for i in rows) for part in (self.prompts, self.wanted, self.unwanted)))

    def tokens(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """[item] first tokens of the wanted and of the unwanted answers.

        Raises DataError where the two begin alike.
        """
        first = subject.tokenizer
        if first is None:
            raise DataError("The model has no tokenizer.", remedy="Open it with one.")
        ids = [[first(text, add_special_tokens=False)["input_ids"][0] for text in side]
               for side in (self.wanted, self.unwanted)]  # fmt: skip
        for i, (one, other) in enumerate(zip(*ids, strict=True)):
            if one == other:
                raise DataError(
                    f"{self.wanted[i]!r} and {self.unwanted[i]!r} begin with the same token.",
                    remedy="Give answers that differ in their first.",
                )
        return torch.tensor(ids[0]), torch.tensor(ids[1])

    def margins(self, subject: Subject, edits: Sequence[Edit] = ()) -> Float[np.ndarray, " item"]:
        """The wanted answer's logit less the unwanted one's."""
        good, bad = self.tokens(subject)
        logits = subject.last_logits(list(self.prompts), edits=list(edits)).float().cpu()
        rows = torch.arange(len(self))
        return (logits[rows, good] - logits[rows, bad]).double().numpy()

    def right(self, subject: Subject, edits: Sequence[Edit] = ()) -> Float[np.ndarray, " item"]:
        """1 where the wanted answer is the likelier of the two."""
        return (self.margins(subject, edits) > 0).astype(float)


@dataclass(frozen=True, eq=False)
class Cause:
    """The parts that bring a behaviour about.

    Attributes:
        heads: (layer, head).
        neurons: (layer, neuron).
        curve: (number of parts, share of `ill` right, share of `well` right) on the half that the number was chosen on;
            the first is with no part taken out.
        scores: of the chosen parts, in logits, best first.
        treatment: takes them out.
    """

    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]
    curve: tuple[tuple[int, float, float], ...]
    scores: tuple[float, ...]
    treatment: Treatment

    def __str__(self) -> str:
        parts = [f"head {layer}.{head}" for layer, head in self.heads]
        parts += [f"neuron {layer}.{neuron}" for layer, neuron in self.neurons]
        return ", ".join(parts)


def find_cause(
    subject: Subject, ill: Choices, well: Choices, *, sizes: Sequence[int] = SIZES, seed: int = 0
) -> Cause:  # fmt: skip
    """The fewest heads and neurons whose removal mends `ill` and spares `well`.

    Args:
        subject: the model.
        ill: where it says what is not wanted.
        well: where it must stay as it is.
        sizes: numbers of parts that are tried.
        seed: of the halves (to rank, and to choose the number).

    Raises:
        DataError: fewer than four items of a side.
    """
    if min(len(ill), len(well)) < 4:
        raise DataError(f"{len(ill)} ill and {len(well)} well items.", remedy="Give at least four of each.")
    generator = np.random.default_rng(seed)
    halves = []
    for some in (ill, well):
        order = generator.permutation(len(some))
        halves.append((some.take(order[: len(some) // 2]), some.take(order[len(some) // 2 :])))
    (ill_a, ill_b), (well_a, well_b) = halves
    ranked = _in_truth(subject, rank_parts(subject, ill_a, well_a), ill_a, well_a)
    curve = [(0, float(ill_b.right(subject).mean()), float(well_b.right(subject).mean()))]
    for size in sorted({min(size, len(ranked)) for size in sizes}):
        edits = without(subject, *_places(ranked[:size]))
        curve.append((size, float(ill_b.right(subject, edits).mean()), float(well_b.right(subject, edits).mean())))
    spared = [point for point in curve[1:] if point[2] >= curve[0][2] - ALLOWED] or curve[1:]
    best = max(point[1] for point in spared)
    size = min(point[0] for point in spared if point[1] >= NEARLY * best)
    chosen = ranked[:size]
    heads, neurons = _places(chosen)
    return Cause(
        heads, neurons, tuple(curve), tuple(score for _, _, score in chosen), remove_parts(subject, heads, neurons)
    )  # fmt: skip


def _in_truth(subject: Subject, parts: list[Part], ill: Choices, well: Choices) -> list[Part]:
    """The first candidates by what taking each out did to the margins; then the others, as they were proposed.

    What counts is the mean margin gained on `ill` up to what makes it right, so that one prompt can't stand for many.
    """
    before = ill.margins(subject), well.margins(subject)
    measured = []
    for kind, place, _ in parts[:CANDIDATES]:
        edits = without(subject, *_places([(kind, place, 0.0)]))
        after = ill.margins(subject, edits), well.margins(subject, edits)
        mended, spoiled = ((np.minimum(a, 0) - np.minimum(b, 0)).mean() for a, b in zip(after, before, strict=True))
        measured.append((kind, place, float(mended + SPOILED * min(spoiled, 0.0))))
    return sorted(measured, key=lambda part: (-part[2], part[0], part[1])) + parts[CANDIDATES:]


def rank_parts(subject: Subject, ill: Choices, well: Choices) -> list[Part]:
    """("head" or "neuron", (layer, number), score) of all parts, best first.

    The score is how much zeroing the part raises the mean margin of `ill` in the linear estimate, less `SPOILED` times
    what it takes from `well`.
    """
    mended, spoiled = zeroing(subject, ill), zeroing(subject, well)
    out = []
    for site, value in mended.items():
        layer, kind = int(site.split(".")[1]), "neuron" if site.endswith("mlp.post") else "head"
        score = value + SPOILED * spoiled[site].clamp(max=0)
        out += [(kind, (layer, number), float(one)) for number, one in enumerate(score.tolist())]
    return sorted(out, key=lambda part: (-part[2], part[0], part[1]))


def zeroing(subject: Subject, answers: Choices) -> dict[str, Float[Tensor, " part"]]:
    """Site -> estimated change of the mean margin by setting each head or neuron to zero at all tokens."""
    layers = range(subject.facts.n_layers)
    known = subject.sites()
    sites = [name for i in layers for name in (f"layer.{i}.attn.z", f"layer.{i}.mlp.post") if known[name].available]
    good, bad = answers.tokens(subject)
    out: dict[str, Tensor] = {}
    for start in range(0, len(answers), AT_A_TIME):
        some = slice(start, start + AT_A_TIME)
        mine = good[some].to(subject.device), bad[some].to(subject.device)

        def metric(logits: Tensor, batch: Batch, mine: tuple[Tensor, Tensor] = mine) -> Tensor:
            last = logits[:, -1] if logits.dim() == 3 else logits
            rows, which = torch.arange(len(last), device=last.device), torch.as_tensor(batch.indices)
            return last[rows, mine[0][which]] - last[rows, mine[1][which]]

        batch = subject.tokens(list(answers.prompts[some]))
        found = subject.gradients(batch, metric, sites)
        mask = batch.mask.cpu()[:, :, None]
        for site in sites:
            moved = -(found.gradients[site].double() * found.values[site].double()).cpu()
            moved = moved.sum(-1) if moved.dim() == 4 else moved
            total = (moved * mask).sum((0, 1)) / len(answers)
            out[site] = out[site] + total if site in out else total
    return out


def _places(parts: Sequence[Part]) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    heads, neurons = (tuple(place for kind, place, _ in parts if kind == which) for which in ("head", "neuron"))
    return heads, neurons


def without(
    subject: Subject, heads: Sequence[tuple[int, int]] = (), neurons: Sequence[tuple[int, int]] = ()
) -> list[Edit]:
    """Edits of a run that do what `remove_parts` does to the weights: to try parts without touching or hashing any."""
    out = [zero(f"layer.{layer}.attn.z[head={head}]") for layer, head in heads]
    for layer in sorted({layer for layer, _ in neurons}):
        mine = torch.tensor([neuron for at, neuron in neurons if at == layer])
        units = torch.nn.functional.one_hot(mine, subject.facts.d_mlp or 1).float()
        out.append(project_out(f"layer.{layer}.mlp.post", units))
    return out
