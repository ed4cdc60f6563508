"""Reading a model's two ends: what starts the stream, the final norm, and which modules can be read by their path."""

from __future__ import annotations

import torch
from torch import nn

from tomoscope.model.probe import Call, Recording
from tomoscope.model.residual import Sum, as_stream, close, is_norm, is_stream, solve, solve_renormalised
from tomoscope.model.structure import Block, Structure, Tap


def read_ends(model: nn.Module, recording: Recording, blocks: list[Block], structure: Structure) -> None:
    """Find embedding, position embedding, final norm and logits; fill the structure's global taps."""
    structure.taps["logits"] = Tap("", "out")
    first, last = recording.calls[blocks[0].path], recording.calls[blocks[-1].path]
    before = [c for c in recording.calls.values() if c.finish < first.start]
    after = [
        c for c in recording.calls.values() if c.start > last.finish and is_norm(c) and close(c.input, last.output)
    ]
    if after:
        structure.taps["norm.final"] = Tap(min(after, key=lambda c: c.start).path, "out")
    else:
        structure.missing["norm.final"] = "no norm reads the last block's output"
    _embedding(model, before, first, recording, structure)


def _embedding(model: nn.Module, before: list[Call], first: Call, recording: Recording, structure: Structure) -> None:
    stream = first.input
    assert stream is not None
    token = _input_embedding(model, recording)
    depths = {call.path: call for call in before}
    sums: Sum | None = None
    pool = [c for c in before if is_stream(c.output, stream) and not is_norm(c) and not _holds_others(c, before)]
    # a dropout after the sum returns the sum itself, which explains nothing
    pool = [c for c in pool if c.path == token or not close(c.output, stream)]
    columns = [as_stream(c.output, stream) for c in pool]  # ty: ignore[invalid-argument-type]
    unique = [i for i in range(len(pool)) if not any(abs(columns[i] - columns[j]).max() == 0 for j in range(i))]
    target = as_stream(stream, stream)
    coarse = stream.dtype in (torch.float16, torch.bfloat16)
    sums = solve(target, [pool[i].path for i in unique], [columns[i] for i in unique], coarse=coarse)
    structure.embed_adds = sums is not None
    if sums is None:
        renormalised = solve_renormalised(stream, before, None, coarse=coarse)
        sums = renormalised.writes if renormalised is not None else None
    if sums is None:
        outer = [c for c in before if close(c.output, stream)]
        why = "the stream's start is not a sum of embeddings"
        if outer:
            structure.taps["embed"] = Tap(min(outer, key=lambda c: c.path.count(".")).path, "out")
        else:
            structure.missing["embed"] = why
        structure.missing["pos_embed"] = why
        return
    structure.embed_terms = sums.terms
    for term in sums.terms:
        positional = "pos" in term.path.rsplit(".", 1)[-1].lower() or term.path.endswith("wpe")
        if term.path == token or (
            not positional
            and "embed" not in structure.taps
            and depths[term.path].module is not None
            and "type" not in term.path
        ):
            structure.taps["embed"] = Tap(term.path, "out", term.factor)
        elif positional:
            structure.taps["pos_embed"] = Tap(term.path, "out", term.factor)
    structure.missing.setdefault("embed", "no token embedding was found among what starts the stream")
    structure.missing.setdefault("pos_embed", "positions are not embedded in the stream (rotary, ALiBi or none)")
    for name in structure.taps:
        structure.missing.pop(name, None)


def silent_modules(model: nn.Module, recording: Recording) -> dict[str, str]:
    """Modules that can't be read by their path, and why."""
    out = {}
    for path, _ in model.named_modules():
        call = recording.calls.get(path)
        if call is None:
            out[path] = "the module was not called in a plain forward"
        elif call.output is None:
            out[path] = "the module returns no tensor"
        elif isinstance(call.raw_output, dict):
            out[path] = "the module returns several tensors; name the module inside it that makes the one you want"
    return out


def _holds_others(call: Call, calls: list[Call]) -> bool:
    """Whether a call is to a container of other recorded modules (the sum's own module, not a summand)."""
    return any(other.path.startswith(call.path + ".") for other in calls)


def _input_embedding(model: nn.Module, recording: Recording) -> str:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        module = None
    return next((path for path, call in recording.calls.items() if call.module is module), "")
