"""ROME: one fact as a rank-one change of one MLP's output projection.

The key k (the projection's input at the subject's last token, averaged over contexts) is mapped to the value that makes
the model give the new answer, while other keys, as their second moments C weigh them, are moved as little as possible:
W + (v - W k) (C^-1 k)^T / (k . C^-1 k). Several facts are written one after the other, each on the model as the ones
before left it.

The paper's code takes the averaged key for the direction and the bare prompt's key in the quotient; Gupta et al. 2024
(arXiv:2403.07175) trace "disabling edits" to that and take the averaged key in both places: the default here. The
paper's form is `form="paper"`. How it can mislead: one fact that was written well says nothing about many (ROME breaks
down after tens of them); the layer that causal tracing points at need not be the best one.

Source: Meng et al. 2022 (arXiv:2202.05262).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import Tensor

from tomoscope.errors import EditError
from tomoscope.model import Subject, Weights
from tomoscope.treat.edit.keys import (
    Edited,
    contexts_of,
    default_layer,
    down_projection,
    fact_keys,
    weight_change,
    weight_name,
)
from tomoscope.treat.edit.moments import SecondMoments
from tomoscope.treat.edit.requests import EditRequest, check_requests
from tomoscope.treat.edit.targets import SCALE_FREE, TargetSettings, check_contexts, find_targets
from tomoscope.treat.treatment import treatment_of

FORMS = ("averaged", "paper")


def rome(
    subject: Subject,
    requests: Sequence[EditRequest] | EditRequest,
    moments: SecondMoments,
    *,
    layer: int | None = None,
    form: str = "averaged",
    at: str = "subject",
    contexts: Sequence[str] | None = None,
    settings: TargetSettings | None = None,
    ridge: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Write facts, one after the other.

    Args:
        subject: unchanged afterwards.
        requests: one or several facts.
        moments: of the layer's keys (`second_moments`).
        layer: a third of the way up by default.
        form: "averaged" (r-ROME) or "paper".
        at: write at the subject's last token ("subject", as the paper does) or at the prompt's ("last").
        contexts: templates, the bare one first; sampled from the model by default.
        settings: of the search for the value.
        ridge: added to the second moments, relative to their diagonal's mean.
        seed: of the contexts.
        progress: called with (facts done, facts).

    Raises:
        EditError: a request that makes no sense, an unknown layer or form, singular second moments.
    """
    requests = [requests] if isinstance(requests, EditRequest) else list(requests)
    if form not in FORMS:
        raise EditError(f"ROME has no form {form!r}.", remedy=f"It is one of {', '.join(FORMS)}.")
    layer = default_layer(subject) if layer is None else layer
    module, name = down_projection(subject, layer), weight_name(subject, layer)
    check_requests(subject, requests)
    moments.at(layer)
    contexts = check_contexts(contexts_of(subject, seed=seed) if contexts is None else contexts)
    settings = settings or (TargetSettings() if form == "paper" else SCALE_FREE)
    lefts, rights, keys, wanted, losses = [], [], [], [], []
    with ExitStack() as stack:
        for done, request in enumerate(requests, start=1):
            found = find_targets(subject, [request], layer, kind="mlp", at=at, contexts=contexts, settings=settings)
            in_contexts = fact_keys(subject, [request], layer, contexts, at)[0]
            key = in_contexts.mean(0)
            left = moments.solve(layer, key[None].double(), ridge=ridge)[0].to(found.delta)
            left = left / left.norm()
            written = in_contexts[:1] if form == "paper" else in_contexts
            with torch.no_grad():
                stands = module(written.to(subject.device)).mean(0).cpu()
            right = (found.wanted[0] - stands) / (written.mean(0).to(left) @ left)
            lefts.append(left)
            rights.append(right)
            keys.append(key)
            wanted.append(found.wanted[0])
            losses.append(found.losses[0])
            if done < len(requests):
                change = weight_change(module, left[:, None], right[None]).dense()
                stack.enter_context(Weights(subject).edited((name, change)))
            if progress is not None:
                progress(done, len(requests))
    u, v = torch.stack(lefts), torch.stack(rights)
    return Edited(
        treatment_of(
            subject, {name: weight_change(module, u.T, v)}, method="ROME" if form == "paper" else "r-ROME",
            requests=[one.plain() for one in requests], seed=seed,
            settings={
                "layer": layer, "form": form, "at": at, "contexts": list(contexts), "ridge": ridge,
                "search": asdict(settings),
                "second_moments": moments.summary(),
            },
        ),
        {layer: torch.stack(keys)}, torch.stack(wanted), torch.stack(losses), (u, v), _notes(losses),
    )  # fmt: skip


def _notes(losses: Sequence[Tensor]) -> dict[str, float]:
    last = [one[~one[:, 0].isnan()][-1] for one in losses]
    return {"final loss": float(torch.stack(last)[:, 0].mean()), "probability": float(torch.stack(last)[:, 4].mean())}
