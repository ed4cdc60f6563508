"""Baselines that train: fine-tuning of one layer's projections, the same inside a box (FT-L), and low-rank adapters.

All three raise the new answers' likelihood by Adam until the mean loss falls below `stop`; FT-L keeps every entry of
the change within `bound` (Zhu et al. 2020, arXiv:2012.00363), LoRA trains W + B A alone (Hu et al. 2021,
arXiv:2106.09685).
The model's parameters are never written: the changed weights are handed to the same forward. How they can mislead:
nothing here looks at other facts, so what else changed is only seen by measuring it; the papers' rates and bounds are
for models a thousand times as wide as a phantom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tomoscope.errors import EditError
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded
from tomoscope.model.gradients import frozen
from tomoscope.model.probe import unwrap
from tomoscope.treat.edit.keys import Edited, default_layer, weight_name
from tomoscope.treat.edit.requests import EditRequest, check_requests, encode_labelled, target_ids
from tomoscope.treat.treatment import Change, Dense, LowRank, treatment_of

Build = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class TuneSettings:
    """How the baselines are trained.

    Attributes:
        steps: passes over the facts at most.
        rate: of Adam.
        stop: mean loss (nats a token) below which training ends.
        batch: facts a step.
        decay: of Adam's weight decay (of the change).
    """

    steps: int = 25
    rate: float = 5e-4
    stop: float = 1e-2
    batch: int = 64
    decay: float = 0.0


def finetune(
    subject: Subject,
    requests: Sequence[EditRequest],
    *,
    layers: Sequence[int] | None = None,
    bound: float | None = None,
    settings: TuneSettings | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Fine-tune the MLP output projections of some layers.

    Args:
        subject: unchanged afterwards.
        requests: the facts.
        layers: a third of the way up by default.
        bound: no entry changes by more than this (FT-L); None for plain fine-tuning.
        settings: of the training.
        seed: of the order of facts.
        progress: called with (steps done, steps).

    Raises:
        EditError: a request that makes no sense, an unknown layer, a bound that is not positive.
    """
    if bound is not None and not bound > 0:
        raise EditError(f"The bound {bound} leaves nothing to change.", remedy="Give a positive one, or none.")
    check_requests(subject, requests)
    names = _names(subject, layers)
    weights = {name: subject.model.get_parameter(name).detach() for name in names}
    deltas = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in weights.items()}

    def clip() -> None:
        if bound is not None:
            for delta in deltas.values():
                delta.clamp_(-bound, bound)

    losses = _train(
        subject, requests, list(deltas.values()), lambda: {n: weights[n] + d for n, d in deltas.items()}, clip,
        settings or TuneSettings(), seed, progress,
    )  # fmt: skip
    changes: dict[str, Change] = {name: Dense(delta.detach().cpu()) for name, delta in deltas.items()}
    told = {"layers": list(layers or [default_layer(subject)]), "bound": bound}
    return _made(subject, requests, changes, "FT" if bound is None else "FT-L", told, settings, losses, seed)


def lora(
    subject: Subject,
    requests: Sequence[EditRequest],
    *,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    settings: TuneSettings | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Train low-rank adapters of the MLP output projections of some layers (all by default); see `finetune`."""
    if rank < 1:
        raise EditError(f"An adapter of rank {rank} changes nothing.", remedy="Give at least 1.")
    check_requests(subject, requests)
    chosen = list(range(subject.facts.n_layers)) if layers is None else list(layers)
    names = _names(subject, chosen)
    weights = {name: subject.model.get_parameter(name).detach() for name in names}
    draw = torch.Generator().manual_seed(seed)
    left, right = {}, {}
    for name, weight in weights.items():
        down = torch.randn(rank, weight.shape[1], generator=draw) / math.sqrt(weight.shape[1])
        left[name] = weight.new_zeros(weight.shape[0], rank).requires_grad_(True)
        right[name] = down.to(weight).requires_grad_(True)
    losses = _train(
        subject, requests, [*left.values(), *right.values()],
        lambda: {name: weights[name] + left[name] @ right[name] for name in names}, lambda: None,
        settings or TuneSettings(), seed, progress,
    )  # fmt: skip
    changes: dict[str, Change] = {n: LowRank(left[n].detach().cpu(), right[n].detach().cpu()) for n in names}
    return _made(subject, requests, changes, "LoRA", {"layers": chosen, "rank": rank}, settings, losses, seed)


def _names(subject: Subject, layers: Sequence[int] | None) -> list[str]:
    chosen = [default_layer(subject)] if layers is None else sorted(set(layers))
    if not chosen:
        raise EditError("There is no layer to train.", remedy="Give at least one.")
    return [weight_name(subject, layer) for layer in chosen]


def _made(
    subject: Subject, requests: Sequence[EditRequest], changes: Mapping[str, Change], method: str,
    told: Mapping[str, Any], settings: TuneSettings | None, losses: list[float], seed: int,
) -> Edited:  # fmt: skip
    made = treatment_of(
        subject, changes, method=method, requests=[one.plain() for one in requests], seed=seed,
        settings={**told, "training": asdict(settings or TuneSettings())},
    )  # fmt: skip
    return Edited(made, {}, notes={"first loss": losses[0], "final loss": losses[-1], "passes": float(len(losses))})


def _train(
    subject: Subject, requests: Sequence[EditRequest], parameters: list[Tensor], build: Build, clip: Callable[[], None],
    settings: TuneSettings, seed: int, progress: Callable[[int, int], None] | None,
) -> list[float]:  # fmt: skip
    """Train the parameters; the mean loss of each pass."""
    rows, answers = [], []
    for one in requests:
        prompt = encode_labelled(subject, one.labelled())
        ids = target_ids(subject, one.labelled(), one.target_new)
        rows.append(Encoded((*prompt.ids, *ids[:-1]), {}, prompt.text))
        answers.append(ids)
    adam = torch.optim.Adam(parameters, lr=settings.rate, weight_decay=settings.decay)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(settings.steps):
        total = 0.0
        shuffled = torch.randperm(len(rows), generator=order).tolist()
        for start in range(0, len(rows), settings.batch):
            mine = shuffled[start : start + settings.batch]
            with torch.enable_grad(), frozen(subject.model):
                loss = _loss(subject, build(), [rows[i] for i in mine], [answers[i] for i in mine])
                adam.zero_grad()
                loss.sum().div(len(mine)).backward()
            adam.step()
            with torch.no_grad():
                clip()
            total += float(loss.detach().sum())
        losses.append(total / len(rows))
        if progress is not None:
            progress(step + 1, settings.steps)
        if losses[-1] < settings.stop:
            break
    return losses


def _loss(
    subject: Subject, weights: dict[str, Tensor], rows: Sequence[Encoded], answers: Sequence[tuple[int, ...]]
) -> Tensor:
    """[fact], nats a token of each answer."""
    batch = subject.tokens(rows)
    longest = max(map(len, answers))
    arguments = subject.forward_arguments(batch)
    if "logits_to_keep" in subject.accepts:
        arguments["logits_to_keep"] = longest
    logits = unwrap(functional_call(subject.model, weights, (), arguments))[0]
    assert logits is not None
    said = logits[:, -longest:].float().log_softmax(-1)
    ids, weight = said.new_zeros(len(rows), longest, dtype=torch.long), said.new_zeros(len(rows), longest)
    for place, answer in enumerate(answers):
        ids[place, longest - len(answer) :] = torch.tensor(answer, device=ids.device)
        weight[place, longest - len(answer) :] = 1.0
    return -(said.gather(-1, ids[..., None])[..., 0] * weight).sum(-1) / weight.sum(-1)
