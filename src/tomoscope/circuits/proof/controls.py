"""Models that learned nothing, as controls: the same architecture with weights that say nothing.

    untrained_like(subject, seed=0)                    weights as the library draws them at the start
    untrained_like(subject, seed=0, kind="shuffled")   each weight matrix's own numbers in another order

How it can mislead: fresh weights are an easy control (GPT-2's are so small that its logits hardly depend on the
prompt); shuffled ones keep every matrix's size and spread, and lose only what the order held.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tomoscope.errors import ModelError
from tomoscope.model import Subject, build_subject

KINDS = ("initial", "shuffled")


def untrained_like(subject: Subject, *, seed: int, kind: str = "initial") -> Subject:
    """A model of the subject's architecture, tokenizer, type and device that has learned nothing.

    Args:
        subject: the model to be like.
        seed: of the weights.
        kind: "initial" (drawn as transformers draws them; needs a config) or "shuffled" (the numbers of each parameter
            in another order).
    """
    if kind not in KINDS:
        raise ModelError(
            f"The kind {kind!r} of untrained model is unknown.", remedy=f"It is one of {', '.join(KINDS)}."
        )
    if kind == "initial":
        if subject.config is None:
            raise ModelError("A module without a config can't be drawn anew.", remedy='Take kind="shuffled".')
        builder: Any = type(subject.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = builder(subject.config)
        model = model.to(device=subject.device, dtype=subject.dtype)
    else:
        model = copy.deepcopy(subject.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return build_subject(model.eval(), tokenizer=subject.tokenizer, name=f"{subject.name}, {kind} weights")
