"""Running part of a model: blocks below a layer are bypassed, and the stream that reaches it is given.

A bypassed block's `forward` is replaced for the call by a function that returns the stream unchanged, in the type the
block returns. Embedding, masks, positions, final norm and head stay the model's own, so this needs no knowledge of a
family.

How it can mislead: blocks that hand on more than the stream (a shared position bias, memory tokens) can't be bypassed;
the callers check a bypassed run against a whole one before they rely on it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tomoscope.errors import UnavailableSiteError
from tomoscope.model.probe import main_input, unwrap
from tomoscope.model.structure import Structure

if TYPE_CHECKING:
    from tomoscope.model.subject import Subject


@contextmanager
def bypassing(subject: Subject, outputs: Mapping[int, Tensor | None]) -> Generator[None]:
    """Replace blocks for the time of the context.

    Args:
        subject: the model.
        outputs: layer -> what the block returns as the stream, or None to pass its input on.
    """
    blocks = [(subject.model.get_submodule(subject.structure.blocks[i].path), i) for i in outputs]
    try:
        for block, layer in blocks:
            # an instance attribute shadows the class's method and is deleted again: nothing of the model is changed
            block.forward = _stand_in(subject.structure, layer, outputs[layer])  # type: ignore[method-assign]
        yield
    finally:
        for block, _ in blocks:
            block.__dict__.pop("forward", None)


def _stand_in(structure: Structure, layer: int, output: Tensor | None) -> Any:
    returns = structure.blocks[layer].returns

    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = main_input(args, kwargs)[0] if output is None else output
        return stream if returns == 0 else (stream, *([None] * (returns - 1)))

    return forward


def unembed(subject: Subject, stream: Tensor) -> Tensor:
    """See `Subject.unembed`: [.., d_model] -> [.., vocab] logits, computed by the model's own end."""
    from tomoscope.model.gradients import frozen

    # a lens is trained through this: gradients flow to the stream where it asks for them, never to the weights
    with torch.set_grad_enabled(torch.is_grad_enabled() and stream.requires_grad), frozen(subject.model):
        return _unembed(subject, stream)


def _unembed(subject: Subject, stream: Tensor) -> Tensor:
    blocks = subject.structure.blocks
    if not blocks or subject.input_name != "input_ids":
        raise UnavailableSiteError("This model has no stack of blocks over tokens, so no stream to read out.")
    flat = stream.reshape(-1, stream.shape[-1]).to(device=subject.device, dtype=subject.dtype)
    width = min(subject.facts.context or 64, 64, len(flat))
    out = []
    for piece in flat.split(width * 64):
        # the streams are laid out as rows of short prompts, whose number no context limits
        short = -len(piece) % width
        rows = torch.nn.functional.pad(piece, (0, 0, 0, short)).reshape(-1, width, flat.shape[-1])
        arguments: dict[str, Any] = {"input_ids": torch.zeros(rows.shape[:2], dtype=torch.long, device=subject.device)}
        skipped: dict[int, Tensor | None] = dict.fromkeys(range(len(blocks) - 1))
        skipped[len(blocks) - 1] = rows
        with bypassing(subject, skipped):
            logits = unwrap(subject.model(**arguments))[0]
        assert logits is not None
        out.append(logits.flatten(0, 1)[: len(piece)])
    return torch.cat(out).reshape(*stream.shape[:-1], -1)
