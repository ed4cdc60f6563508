"""What each family of the tests' zoo gives, by opening a tiny random model of it: nothing here is written by hand."""

from __future__ import annotations

import string
from typing import Any

from builder.prose import escape


def page() -> str:
    """A table of the families, and for each site that a family lacks, the reason that opening gave."""
    import torch
    from tests.zoo import ZOO

    from tomoscope.model import open_model

    out = [
        "# Families",
        "Each row was made by opening a tiny random model of the family (tests/zoo.py) and asking it. *Parity* is "
        "the largest difference of its logits, while all its streams are read, from those of a plain forward; "
        "*identity* says that the stream after each block is the stream before it plus what attention and MLP "
        "write. No family has code of its own beyond the small table of src/tomoscope/model/families.py: the same "
        "way of opening solves 162 of the 175 causal architectures of transformers 5.23 that can be built tiny, "
        "bit-identical and with the identity exact (tests/test_sweep.py). A `router` exists in mixtures of experts "
        "alone.",
        "| family | kind | parity | identity | attention and MLP | not given |",
    ]
    out[-1] += "\n|---|---|---|---|---|---|"
    reasons: dict[str, str] = {}
    with torch.random.fork_rng():
        for name, entry in ZOO.items():
            example = entry.inputs() if entry.kind == "module" else None
            out[-1] += "\n" + _row(name, open_model(entry.build(), example=example), reasons)
    out += ["## Why not", "\n".join(f"- {mark} {escape(reason)}" for reason, mark in reasons.items())]
    return "\n\n".join(out)


def _row(name: str, subject: Any, reasons: dict[str, str]) -> str:
    facts = subject.facts
    parity = "bit-identical" if facts.parity == 0 else f"{facts.parity:.1e}" if facts.parity is not None else ""
    held = facts.identity_error is not None and facts.identity_error < 1e-6 and not facts.unsolved
    identity = "exact" if held else "no stack of blocks" if not facts.n_layers else "not solved"
    order = "parallel" if facts.parallel else "one after the other" if held else ""
    order += ", stream normalised after each" if facts.renormalised else ""
    missing: dict[tuple[str, str], list[int]] = {}
    for site, info in subject.sites().items():
        layer, part = _split(site)
        if not info.available and (layer >= 0 or facts.n_layers):
            missing.setdefault((part, info.reason), []).append(layer)
    told = []
    for (part, reason), layers in missing.items():
        if part == "router" and len(layers) == facts.n_layers:
            continue
        mark = reasons.setdefault(reason, f"({string.ascii_lowercase[len(reasons)]})")
        where = "" if len(layers) == facts.n_layers or layers == [-1] else f" in layer {', '.join(map(str, layers))}"
        told.append(f"`{part}`{where} {mark}")
    if not facts.n_layers:
        told = ["sites are the module paths"]
    return f"| {name} | {facts.kind} | {parity} | {identity} | {order} | {', '.join(told)} |"


def _split(site: str) -> tuple[int, str]:
    pieces = site.split(".", 2)
    return (int(pieces[1]), pieces[2]) if pieces[0] == "layer" else (-1, site)
