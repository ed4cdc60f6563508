"""The end of a call: no cache, the last token's logits only, and of these only the tokens that a metric asks for.

A vocabulary is wide: for a short prompt all its logits cost as much as a layer or two. Where the unembedding is a
linear map, its forward is replaced for the call by one of the wanted rows; what the model does after it (a scale, a
soft-cap) works on each logit alone, which is checked once a model.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tomoscope.circuits.metrics import Metric
from tomoscope.errors import ModelError
from tomoscope.model import Batch, Subject
from tomoscope.model.probe import unwrap

PROBE_TOKENS = 3


def calling_arguments(subject: Subject, batch: Batch) -> dict[str, Any]:
    """The arguments of a forward that keeps no cache and, where all prompts end in one column, no other logits."""
    arguments = subject.forward_arguments(batch)
    if "use_cache" in subject.accepts:
        arguments["use_cache"] = False
    if "logits_to_keep" in subject.accepts and bool((batch.last == batch.width - 1).all()):
        arguments["logits_to_keep"] = 1
    return arguments


def last_logits(output: Any, batch: Batch) -> Float[Tensor, "pair vocab"]:
    """[pair, vocab] at each prompt's last token, from what `calling_arguments` gave."""
    logits = unwrap(output)[0]
    if logits is None:
        raise ModelError("The model gave no logits.")
    if logits.dim() == 2:
        return logits
    if logits.shape[1] == 1:
        return logits[:, 0]
    rows = torch.arange(len(batch), device=logits.device)
    return logits[rows, batch.last.to(logits.device)]


def metric_of(metric: Metric, logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """A metric of logits over the whole vocabulary, or over the metric's tokens alone (`unembedding`)."""
    tokens = metric.tokens
    whole = tokens is None or logits.shape[1] == len(tokens)
    return metric(logits if whole or tokens is None else logits[:, tokens.to(logits.device)], rows)


@contextmanager
def unembedding(subject: Subject, tokens: Int[Tensor, " token"] | None) -> Generator[None]:
    """Inside, the model gives the logits of some tokens only (of all, where None or where it can't be restricted).

    Enter it before anything hooks the model: the first time it runs a few tokens of its own.
    """
    head = _head(subject)
    if tokens is None or head is None or not _restricts(subject, head):
        yield
        return
    with _restricted(head, tokens):
        yield


@contextmanager
def _restricted(head: nn.Linear, tokens: Tensor) -> Generator[None]:
    chosen = tokens.to(head.weight.device)
    weight, bias = head.weight.detach()[chosen], None if head.bias is None else head.bias.detach()[chosen]

    def forward(input: Tensor) -> Tensor:
        return nn.functional.linear(input, weight, bias)

    # an instance attribute shadows the class's method and is deleted again: nothing of the model is changed
    head.forward = forward
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)


def _head(subject: Subject) -> nn.Linear | None:
    getter = getattr(subject.model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    return module if type(module) is nn.Linear else None


_CHECKED: WeakKeyDictionary[Subject, bool] = WeakKeyDictionary()


@torch.no_grad()
def _restricts(subject: Subject, head: nn.Linear) -> bool:
    """Whether the logits of some tokens are the same when no others are computed."""
    if subject not in _CHECKED:
        batch = subject.tokens(torch.arange(PROBE_TOKENS)[None])
        tokens = torch.arange(0, head.weight.shape[0], max(1, head.weight.shape[0] // 7))
        whole = last_logits(subject.model(**calling_arguments(subject, batch)), batch)
        try:
            with _restricted(head, tokens):
                some = last_logits(subject.model(**calling_arguments(subject, batch)), batch)
            wanted = whole[:, tokens.to(whole.device)]
            gap = 1e-4 if subject.dtype in (torch.float32, torch.float64) else 3e-2
            same = some.shape == wanted.shape and bool((some - wanted).abs().max() <= gap * wanted.abs().max())
        except (RuntimeError, ValueError, IndexError):
            same = False  # something after the unembedding counts on the whole vocabulary
        _CHECKED[subject] = same
    return _CHECKED[subject]
