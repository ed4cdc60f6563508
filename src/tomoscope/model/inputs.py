"""What a model is given: prompts, images or its own inputs as a padded batch, and the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tomoscope.errors import PromptError
from tomoscope.model.batch import Batch, Encoded, PromptInput, collate, encode

if TYPE_CHECKING:
    from tomoscope.model.subject import Subject

Prompts = PromptInput | Sequence[PromptInput] | Sequence[Encoded] | Batch | Mapping[str, Tensor] | Tensor


def to_batch(subject: Subject, prompts: Prompts) -> Batch:
    """See `Subject.tokens`."""
    if isinstance(prompts, Batch):
        return prompts
    if isinstance(prompts, Mapping):
        return _from_mapping(subject, prompts)
    if subject.input_name != "input_ids":
        return _from_mapping(subject, {subject.input_name: torch.as_tensor(prompts)})
    if isinstance(prompts, Tensor) and prompts.dim() == 2:
        return _from_mapping(subject, {"input_ids": prompts})
    single = isinstance(prompts, str) or hasattr(prompts, "spans") or _is_ids(prompts)
    listed: list[Any] = [prompts] if single else list(prompts)  # type: ignore[arg-type]
    if not listed:
        raise PromptError("There is no prompt to look at.", remedy="Give at least one.")
    encoded = [encode(p, subject.tokenizer, context=subject.facts.context, row=row) for row, p in enumerate(listed)]
    _check_ids(subject, encoded)
    return collate(encoded, pad_id=_pad_id(subject), left=subject.facts.kind == "decoder", device=subject.device)


def forward_arguments(subject: Subject, batch: Batch, *, cached: bool = False) -> dict[str, Any]:
    """See `Subject.forward_arguments`."""
    arguments: dict[str, Any] = dict(batch.extra)
    if batch.input_ids is not None:
        arguments["input_ids"] = batch.input_ids
        if batch.attention_mask is not None and "attention_mask" in subject.accepts:
            arguments["attention_mask"] = batch.attention_mask
        left = bool((batch.pads > 0).any())
        if left and "position_ids" in subject.accepts and "position_ids" not in arguments:
            arguments["position_ids"] = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # ty: ignore[missing-union-attribute]
    if cached:
        # otherwise left to the model's own default, so that logits are bit-identical to a plain call
        arguments["use_cache"] = True
    return arguments


def _check_ids(subject: Subject, encoded: Sequence[Encoded]) -> None:
    size = _embedding_rows(subject) if subject.structure.taps else None
    for row, prompt in enumerate(encoded):
        wrong = [token for token in prompt.ids if size and not 0 <= token < size]
        if wrong:
            raise PromptError(
                f"Prompt {row} holds token id {wrong[0]}, but the model's vocabulary has {size} entries.",
                remedy="Use the tokenizer that belongs to the model.",
            )


def _embedding_rows(subject: Subject) -> int | None:
    getter = getattr(subject.model, "get_input_embeddings", None)
    try:
        weight = getattr(getter(), "weight", None) if getter else None
    except (NotImplementedError, AttributeError):
        return None
    return int(weight.shape[0]) if isinstance(weight, Tensor) and subject.input_name == "input_ids" else None


def _pad_id(subject: Subject) -> int:
    for holder in (subject.tokenizer, subject.config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < (_embedding_rows(subject) or value + 1):
                return value
    return 0


def _from_mapping(subject: Subject, inputs: Mapping[str, Tensor]) -> Batch:
    extra = {name: torch.as_tensor(value).to(subject.device) for name, value in inputs.items()}
    ids, mask = extra.pop("input_ids", None), extra.pop("attention_mask", None)
    rows = len(ids) if ids is not None else len(next(iter(extra.values())))
    if ids is None:
        extra = {n: v.to(subject.dtype) if v.is_floating_point() else v for n, v in extra.items()}
        prompts = tuple(Encoded(tuple(range(subject.positions))) for _ in range(rows))
        return Batch(None, mask, prompts, torch.zeros(rows, dtype=torch.long), extra)
    mask = torch.ones_like(ids) if mask is None else mask
    pads = mask.int().argmax(dim=1).cpu()
    prompts = tuple(Encoded(tuple(row[m.bool()].tolist())) for row, m in zip(ids, mask, strict=True))
    return Batch(ids, mask, prompts, pads, extra)


def _is_ids(prompts: Any) -> bool:
    if isinstance(prompts, Tensor):
        return prompts.dim() == 1
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(p, int) for p in prompts)


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)
