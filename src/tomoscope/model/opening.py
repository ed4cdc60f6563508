"""Opening: from a torch module to a subject, by a probe forward and nothing that is family-specific.

Steps: find the inputs, record one forward, find the blocks, solve them, find embedding and head, tell a decoder from an
encoder by whether the first position sees the last, and measure that reading leaves the logits as they were.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tomoscope.errors import CorruptModelError, ModelError, UnavailableSiteError
from tomoscope.model import families
from tomoscope.model.blocks import find_attention, find_blocks, read_blocks
from tomoscope.model.ends import read_ends, silent_modules
from tomoscope.model.facts import Facts
from tomoscope.model.inputs import accepted_arguments
from tomoscope.model.probe import Recording, record, unwrap
from tomoscope.model.sites import PART_AXES, Site, SiteGrammar
from tomoscope.model.structure import Structure, Tap
from tomoscope.model.subject import Subject
from tomoscope.model.taps import Session, find_tap

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model."""
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def setting(config: Any, *names: str) -> Any:
    """The first of some config entries that is there; heterogeneous configs may raise on some."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except (AttributeError, ValueError, KeyError, TypeError):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def probe_inputs(model: nn.Module, example: Any) -> tuple[dict[str, Any], str]:
    """Inputs for the probe and the name of the main one: given by the caller, or made from the config."""
    accepts = accepted_arguments(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if example is not None:
        named = (
            dict(example) if isinstance(example, Mapping) else {next(iter(accepts), "input"): torch.as_tensor(example)}
        )
        name = str(getattr(model, "main_input_name", None) or next(iter(named)))
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()}, name
    config = getattr(model, "config", None)
    if config is None:
        return {}, next(iter(accepts), "input")
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = int(setting(config, "num_channels") or 3)
        return {name: torch.randn(2, channels, height, width, generator=generator).to(device, dtype)}, name
    size = int(setting(text_config(config), "vocab_size") or 2)
    ids = torch.randint(min(size - 1, 5), size, (2, PROBE_TOKENS), generator=generator).to(device)
    inputs = {name: ids}
    if "attention_mask" in accepts:
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs, name


def build_subject(
    model: nn.Module, *, tokenizer: Any = None, name: str = "", source: str | None = None, example: Any = None
) -> Subject:
    """Open a module that is in memory.

    Args:
        model: any module; a compiled one is opened by what it wraps.
        tokenizer: for text.
        name: for reports.
        source: directory or hub id it came from.
        example: inputs for the probe; needed for a module without a transformers config.
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        # hooks added after the first compiled call are silently ignored by torch.compile
        logger.info("the model is compiled; the module inside is opened, because hooks on a compiled one are ignored")
        model = inner
    model.eval()
    check_finite(model)
    inputs, input_name = probe_inputs(model, example)
    config = text_config(getattr(model, "config", None))
    heads = int(setting(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0)
    structure, recording = _structure(model, inputs, heads)
    blocks = structure.blocks
    modules = frozenset(path for path, _ in model.named_modules() if path)
    shapes = next((b.shapes for b in blocks if "n_heads" in b.shapes), {})
    grammar = SiteGrammar(
        len(blocks),
        shapes.get("n_heads", 0),
        shapes.get("n_kv_heads", shapes.get("n_heads", 0)),
        modules,
        _aliases(structure),
    )
    subject = Subject(
        model, tokenizer, name or type(model).__name__, _facts(model, structure, recording, inputs, input_name, shapes),
        structure, grammar, source, accepted_arguments(model), input_name,
        _fixed_positions(recording, structure, input_name),
    )  # fmt: skip
    if inputs:
        _measure(subject, inputs)
    return subject


def _fixed_positions(recording: Recording, structure: Structure, input_name: str) -> int:
    """Length of the stream of a model whose inputs have one size, else 0."""
    if input_name == "input_ids" or not structure.blocks:
        return 0
    stream = recording.calls[structure.blocks[0].path].input
    return 0 if stream is None else int(stream.shape[1])


def check_finite(model: nn.Module) -> None:
    """Raise if a parameter or buffer holds NaN or infinity, and say which and how many.

    Raises:
        CorruptModelError: with the first tensors found.
    """
    bad = []
    for name, tensor in [
        *model.named_parameters(),
        *((n, b) for n, b in model.named_buffers() if n in model.state_dict()),
    ]:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        # one sum settles nearly every tensor; only a sum that is not finite is looked at number by number
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            count = int((~torch.isfinite(tensor)).sum())
            if count:
                bad.append(f"{name} ({count} of {tensor.numel()})")
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise CorruptModelError(
            f"The model's weights hold NaN or infinity: {', '.join(bad[:3])}{more}.",
            remedy="Training diverged or the file is damaged; open an earlier checkpoint.",
        )


def _structure(model: nn.Module, inputs: dict[str, Any], heads: int) -> tuple[Structure, Recording]:
    nothing = Structure([], {}, {"embed": "", "pos_embed": "", "norm.final": "", "logits": ""}, None)
    if not inputs:
        reason = "the module was opened without example inputs, so nothing could be probed"
        nothing.missing = dict.fromkeys(nothing.missing, reason)
        return nothing, Recording()
    try:
        recording = record(model, (), inputs, n_heads=heads)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(
            f"The probe forward failed: {type(error).__name__}: {error}.",
            remedy="Give open_model(..., example=inputs that the model accepts).",
        ) from error
    paths = find_blocks(model, recording)
    inline = [a for a, route in (find_attention(path, recording) for path in paths) if a and not route]
    if inline and heads:
        recording = record(model, (), inputs, n_heads=heads, traced=inline)
    nothing.silent = silent_modules(model, recording)
    if not paths:
        reason = "the model is no stack of blocks that hand on one stream; read its modules by their paths"
        nothing.missing = dict.fromkeys(nothing.missing, reason)
        if unwrap(recording.output)[0] is not None:
            nothing.taps["logits"] = Tap("", "out")
            nothing.missing.pop("logits")
        return nothing, recording
    blocks = read_blocks(recording, paths, n_heads=heads, inline=inline)
    structure = Structure(blocks, {}, {}, int(recording.calls[paths[0]].output.shape[-1]))  # ty: ignore[missing-union-attribute]
    structure.silent = nothing.silent
    read_ends(model, recording, blocks, structure)
    _explain(structure, getattr(getattr(model, "config", None), "model_type", ""))
    return structure, recording


def _explain(structure: Structure, family: str) -> None:
    known = families.UNSOLVED.get(family)
    for block in structure.blocks:
        if known and block.kind == "unsolved":
            block.missing.update(dict.fromkeys(("attn.out", "mlp.out", "resid_mid"), known))
        for part in PART_AXES:
            if part not in block.taps:
                block.missing.setdefault(part, "this block has no such place")


def _aliases(structure: Structure) -> dict[str, Site]:
    """nnsight-style paths that are a named site: a block's output is resid_post, its input resid_pre."""
    out = {}
    for layer, block in enumerate(structure.blocks):
        out[f"{block.path}.output"] = Site("resid_post", layer)
        out[f"{block.path}.input"] = Site("resid_pre", layer)
    return out


@torch.no_grad()
def _is_decoder(model: nn.Module, inputs: dict[str, Any], name: str, last_block: str) -> bool:
    """Whether the first position is blind to the last token."""
    ids = inputs[name]
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % (int(ids.max()) + 1)
    seen = []
    for one in (ids, changed):
        module = model.get_submodule(last_block)
        handle = module.register_forward_hook(lambda m, a, out: seen.append(unwrap(out)[0][:, 0].clone()))  # ty: ignore[not-subscriptable]
        try:
            model(**{**inputs, name: one})
        finally:
            handle.remove()
    # not bit for bit: a mixture's grouped products may round differently when another token takes another expert
    return bool((seen[0] - seen[1]).abs().max() <= 1e-3 * seen[0].abs().max())


def _facts(
    model: nn.Module,
    structure: Structure,
    recording: Recording,
    inputs: dict[str, Any],
    input_name: str,
    shapes: dict[str, int],
) -> Facts:
    blocks, config = structure.blocks, getattr(model, "config", None)
    text = text_config(config)
    logits = unwrap(recording.output)[0]
    kind = "module"
    if config is not None:
        kind = "vision" if input_name == "pixel_values" else "encoder"
        # a config may say so itself: what a position sees need not show on the probe's few tokens
        blind = getattr(config, "is_causal", True) is not False
        if kind == "encoder" and blind and blocks and _is_decoder(model, inputs, input_name, blocks[-1].path):
            kind = "decoder"
    unsolved = tuple(f"layer.{i}: {b.missing.get('mlp.out', '')}" for i, b in enumerate(blocks) if b.kind == "unsolved")
    errors = [b.identity_error for b in blocks if b.identity_error is not None]
    context = (
        setting(text, "max_position_embeddings", "n_positions", "max_seq_len") if input_name == "input_ids" else None
    )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Facts(
        family=getattr(config, "model_type", "") or type(model).__name__,
        kind=kind,
        n_layers=len(blocks),
        d_model=structure.d_model,
        n_heads=shapes.get("n_heads", 0),
        n_kv_heads=shapes.get("n_kv_heads", shapes.get("n_heads", 0)),
        head_dim=shapes.get("head_dim"),
        d_mlp=next((b.shapes["d_mlp"] for b in blocks if "d_mlp" in b.shapes), None),
        d_vocab=int(logits.shape[-1]) if logits is not None else None,
        context=int(context) if context and context > 0 else None,
        parallel=any(b.parallel for b in blocks),
        renormalised=any(b.kind == "renormalised" for b in blocks),
        n_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        identity_error=max(errors, default=None) if not unsolved else None,
        unsolved=unsolved,
    )


@torch.no_grad()
def _measure(subject: Subject, inputs: dict[str, Any]) -> None:
    """Measure how far reading every site at once moves the logits, and check the residual identity on this very
    model.
    """
    plain = unwrap(subject.model(**inputs))[0]
    rows = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    wanted = []
    for site in [Site(p) for p in ("embed", "norm.final")] + [
        Site(p, i) for i in range(subject.facts.n_layers) for p in PART_AXES
    ]:
        try:
            find_tap(subject.structure, site)
            wanted.append(site)
        except UnavailableSiteError:
            continue
    session = Session(subject.model, subject.structure, reads=wanted, batch_size=rows)
    with session:
        read = unwrap(subject.model(**inputs))[0]
    parity = None if plain is None or read is None else float((plain.float() - read.float()).abs().max())
    silent = {site for site in wanted if site not in session.values}
    for site in silent:
        # a place that the probe found but a plain call never passes through is not there
        if site.layer is not None:
            subject.structure.blocks[site.layer].taps.pop(site.part, None)
            subject.structure.blocks[site.layer].missing[site.part] = "it was not computed in a plain forward"
    object.__setattr__(subject, "facts", dataclasses.replace(subject.facts, parity=parity))
