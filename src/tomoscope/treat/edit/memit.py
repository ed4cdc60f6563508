"""MEMIT and AlphaEdit: many facts at once, spread over the output projections of several layers' MLPs.

For each fact a target z for the stream after the last of the layers is sought (all facts in batches). Then, layer by
layer upward and on the model as the lower layers' changes leave it, the part of what is missing that falls to this
layer, R = (z - now) / (layers left), is written at the facts' keys K:

    MEMIT      dW = R K^T (weight C + K K^T)^-1             C the second moments of other keys
    AlphaEdit  dW = R K^T P (K K^T P + Kp Kp^T P + ridge I)^-1     P projects on where C is small

`weight` counts the other keys: the papers take 15,000 (GPT-J, 16,384 neurons) and 20,000 (GPT-2 XL, 6,400); here it is
the number of neurons by default. AlphaEdit's threshold is on C's raw scale in the paper (2e-2); by default here P takes
the directions that together hold at most 2 % of C's trace. How they can mislead: a small model has no null space to
speak of (see `notes["null space"]`), and protects little by it.

Where a norm or scale stands between the projection and the stream, R is carried back through it coordinate by
coordinate, as it acts on the value that stands there.

Sources: Meng et al. 2023 (arXiv:2210.07229); Fang et al. 2024 (arXiv:2410.02355).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import EditError
from tomoscope.model import Subject, Weights
from tomoscope.treat.edit.keys import (
    Edited,
    average_keys,
    contexts_of,
    default_layer,
    down_projection,
    fact_keys,
    weight_change,
    weight_name,
)
from tomoscope.treat.edit.moments import SecondMoments
from tomoscope.treat.edit.requests import EditRequest, check_requests, encode_labelled
from tomoscope.treat.edit.targets import SCALE_FREE, Targets, TargetSettings, check_contexts, find_targets
from tomoscope.treat.treatment import Change, treatment_of

PAPER = TargetSettings(clamp=0.75)
"""MEMIT's for GPT-2 XL."""
SETTINGS = replace(SCALE_FREE, clamp=0.75)
Solve = Callable[[int, Float[Tensor, "neuron fact"]], Float[Tensor, "neuron fact"]]
"""Layer and keys -> what each fact's missing part is multiplied by."""


def default_layers(subject: Subject) -> list[int]:
    """Up to five layers that end a third of the way up."""
    last = default_layer(subject)
    return list(range(max(0, last - 4), last + 1))


def memit(
    subject: Subject,
    requests: Sequence[EditRequest],
    moments: SecondMoments,
    *,
    layers: Sequence[int] | None = None,
    at: str = "subject",
    weight: float | None = None,
    contexts: Sequence[str] | None = None,
    settings: TargetSettings | None = None,
    targets: Targets | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Write facts together.

    Args:
        subject: unchanged afterwards.
        requests: the facts.
        moments: of the layers' keys.
        layers: five that end a third of the way up, by default.
        at: write at the subject's last token ("subject", as the papers do) or at the prompt's ("last").
        weight: of the second moments against the facts' keys; the number of neurons by default.
        contexts: templates, the bare one first; sampled from the model by default.
        settings: of the search for targets.
        targets: found before with the same layers and settings.
        seed: of the contexts.
        batch: facts at once in the search.
        progress: called with (facts done, facts).

    Raises:
        EditError: a request that makes no sense, an unknown layer.
    """
    weight = float(subject.facts.d_mlp or 1) if weight is None else weight

    def solve(layer: int, keys: Tensor) -> Tensor:
        return torch.linalg.solve(weight * moments.at(layer) + keys @ keys.T, keys)

    return _spread(
        subject, requests, moments, solve, "MEMIT", {"weight": weight}, layers, at, contexts, settings, targets, seed,
        batch, progress,
    )  # fmt: skip


def alphaedit(
    subject: Subject,
    requests: Sequence[EditRequest],
    moments: SecondMoments,
    *,
    layers: Sequence[int] | None = None,
    at: str = "subject",
    share: float = 0.02,
    threshold: float | None = None,
    ridge: float = 10.0,
    kept: Mapping[int, Float[Tensor, "fact neuron"]] | None = None,
    contexts: Sequence[str] | None = None,
    settings: TargetSettings | None = None,
    targets: Targets | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Write facts together, inside the null space of the second moments.

    Args:
        share: P takes the smallest directions of C that together hold at most this share of its trace.
        threshold: P takes eigenvalues of C below this instead (the paper's 2e-2).
        ridge: of the solution (the paper's 10).
        kept: layer -> keys of edits before, which stay as they are (`Edited.keys`).
        subject, requests, moments, layers, at, contexts, settings, targets, seed, batch, progress: see `memit`.

    Raises:
        EditError: a request that makes no sense, an unknown layer, no null space.
    """
    notes: dict[str, float] = {}
    spaces: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor) -> Tensor:
        if layer not in spaces:
            spaces[layer] = null_space(moments.at(layer), share=share, threshold=threshold)
            notes[f"null space of layer {layer}"] = float(spaces[layer].trace()) / len(keys)
        inside, gram = spaces[layer], keys @ keys.T
        if kept is not None and layer in kept:
            before = kept[layer].double()
            gram = gram + before.T @ before
        whole = inside @ gram + ridge * torch.eye(len(keys), dtype=keys.dtype)
        return torch.linalg.solve(whole, inside @ keys)

    told = {
        "share": share,
        "threshold": threshold,
        "ridge": ridge,
        "edits_before": sum(map(len, (kept or {}).values())),
    }
    made = _spread(
        subject,
        requests,
        moments,
        solve,
        "AlphaEdit",
        told,
        layers,
        at,
        contexts,
        settings,
        targets,
        seed,
        batch,
        progress,
    )
    return replace(made, notes={**made.notes, **notes})


def null_space(
    moments: Float[Tensor, "neuron neuron"], *, share: float = 0.02, threshold: float | None = None
) -> Float[Tensor, "neuron neuron"]:
    """The projector on the directions of small second moments. Raises EditError where there is none."""
    values, vectors = torch.linalg.eigh(moments.double())  # rising
    if threshold is not None:
        small = values < threshold
    else:
        small = values.clamp(min=0).cumsum(0) <= share * values.clamp(min=0).sum()
    if not bool(small.any()):
        raise EditError("The second moments have no small directions.", remedy="Give a larger share or threshold.")
    chosen = vectors[:, small]
    return chosen @ chosen.T


def _spread(
    subject: Subject, requests: Sequence[EditRequest], moments: SecondMoments, solve: Solve, method: str,
    told: Mapping[str, float | None], layers: Sequence[int] | None, at: str, contexts: Sequence[str] | None,
    settings: TargetSettings | None, targets: Targets | None, seed: int, batch: int | None,
    progress: Callable[[int, int], None] | None,
) -> Edited:  # fmt: skip
    requests = [requests] if isinstance(requests, EditRequest) else list(requests)
    chosen = sorted(default_layers(subject) if layers is None else set(layers))
    if not chosen:
        raise EditError("There is no layer to write to.", remedy="Give at least one.")
    for layer in chosen:
        down_projection(subject, layer)
        moments.at(layer)
    check_requests(subject, requests)
    contexts = check_contexts(contexts_of(subject, count=5, seed=seed) if contexts is None else contexts)
    settings = settings or SETTINGS
    if targets is None:
        targets = find_targets(
            subject, requests, chosen[-1], kind="block", at=at, contexts=contexts, settings=settings, batch=batch,
            progress=progress,
        )  # fmt: skip
    changes: dict[str, Change] = {}
    keys: dict[int, Tensor] = {}
    missing = float(targets.delta.norm(dim=-1).mean())
    with ExitStack() as stack:
        for place, layer in enumerate(chosen):
            keys[layer] = average_keys(fact_keys(subject, requests, layer, contexts, at), halves=True)
            now, ratio = _stands(subject, requests, layer, chosen[-1], at)
            part = (targets.wanted.double() - now) / (len(chosen) - place) * ratio
            factor = solve(layer, keys[layer].double().T)
            module, name = down_projection(subject, layer), weight_name(subject, layer)
            change = weight_change(module, factor, part)
            changes[name] = change
            stack.enter_context(Weights(subject).edited((name, change.dense())))
        now, _ = _stands(subject, requests, chosen[-1], chosen[-1], at)
        left = float((targets.wanted.double() - now).norm(dim=-1).mean())
    return Edited(
        treatment_of(
            subject, changes, method=method, requests=[one.plain() for one in requests], seed=seed,
            settings={
                **told, "layers": chosen, "at": at, "contexts": list(contexts), "search": asdict(settings),
                "second_moments": moments.summary(),
            },
        ),
        keys, targets.wanted, targets.losses, None, {"missing before": missing, "missing after": left},
    )  # fmt: skip


@torch.no_grad()
def _stands(
    subject: Subject, requests: Sequence[EditRequest], layer: int, last: int, at: str
) -> tuple[Float[Tensor, "fact d_model"], Float[Tensor, "fact d_model"]]:
    """What stands after the last layer, and how far a layer's projection must move for the stream to move by one."""
    batch = subject.tokens([encode_labelled(subject, one.labelled(), at) for one in requests])
    after, inner, outer = f"layer.{last}.resid_post", subject.structure.blocks[layer].down, f"layer.{layer}.mlp.out"
    found = subject.read(batch, after, outer, at="edited")
    columns = batch.columns("edited")[0]
    assert columns is not None
    whole = subject.read(batch, inner)[inner]  # a module is read whole: its positions have no names
    given = whole.reshape(len(batch), -1, whole.shape[-1])[torch.arange(len(batch)), columns[:, 0]].double()
    written = found[outer].double()
    ratio = torch.where(given == written, torch.ones_like(given), given / torch.where(written == 0, given, written))
    return found[after].double(), ratio
