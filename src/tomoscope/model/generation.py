"""Continuing prompts under edits, with a key-value cache and equal to the same without one.

Positions are absolute: an edit at "last" is written at the prompt's last token, in prefill and in no later step; an
edit without `at` is written at every token, prompt and generated. `during="prefill"` or "decode" restricts an edit to
the prompt or to generated tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tomoscope.errors import PromptError
from tomoscope.model.batch import Batch
from tomoscope.model.edits import Edit
from tomoscope.model.probe import unwrap
from tomoscope.model.regions import Bound
from tomoscope.model.taps import Session

if TYPE_CHECKING:
    from tomoscope.model.subject import Subject


@torch.no_grad()
def generate_tokens(
    subject: Subject,
    prompts: Any,
    *,
    max_new_tokens: int,
    edits: Sequence[Edit] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
) -> list[list[int]]:
    """Generated token ids of each prompt, up to and without the end-of-text token.

    Args:
        subject: a decoder.
        prompts: see `Subject.tokens`.
        max_new_tokens: most tokens to add.
        edits: written at their absolute positions.
        temperature: 0 takes the most probable token.
        top_p: nucleus sampling: the smallest set of tokens that holds this probability.
        seed: of the sampling; the same on every device.
        cached: keep keys and values (families without a cache recompute).

    Raises:
        PromptError: the prompt and the new tokens do not fit into the context.
    """
    batch = subject.tokens(prompts)
    context = subject.facts.context
    if context is not None and max(batch.lengths) + max_new_tokens > context:
        raise PromptError(
            f"A prompt of {max(batch.lengths)} tokens and {max_new_tokens} new ones exceed the context of {context}.",
            remedy="Ask for fewer new tokens or shorten the prompt.",
        )
    bound = subject.bind(edits, batch)
    session = Session(subject.model, subject.structure, edits=bound, batch_size=len(batch))
    prompt_width = batch.width
    generator = torch.Generator().manual_seed(seed)
    ends = _end_tokens(subject)
    finished = torch.zeros(len(batch), dtype=torch.bool)
    made: list[Tensor] = []
    cache, current = None, batch
    cached = cached and "past_key_values" in subject.accepts
    with session:
        for step in range(max_new_tokens):
            arguments = subject.forward_arguments(current, cached=cached)
            if cached and step > 0:
                arguments = _step_arguments(arguments, current, cache)
                session.past, session.phase = current.width - 1, "decode"
            elif step > 0:
                # everything is computed again in one call, so what belongs to a phase is told by its columns
                session.set_edits(_by_column(bound, len(batch), prompt_width, current.width))
            output = subject.model(**arguments)
            cache = getattr(output, "past_key_values", None)
            if cached and cache is None:
                cached = False
            logits = unwrap(output)[0]
            assert logits is not None
            chosen = _choose(logits[:, -1].float().cpu(), temperature, top_p, generator)
            made.append(chosen)
            finished |= torch.isin(chosen, ends)
            if bool(finished.all()):
                break
            current = _longer(current, chosen)
    rows = torch.stack(made, dim=1).tolist() if made else [[] for _ in range(len(batch))]
    stops = set(ends.tolist())
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def _step_arguments(arguments: dict[str, Any], batch: Batch, cache: Any) -> dict[str, Any]:
    arguments["input_ids"] = arguments["input_ids"][:, -1:]
    if "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"][:, -1:]
    arguments["past_key_values"] = cache
    return arguments


def _by_column(bound: Sequence[Bound], batch_size: int, prompt_width: int, width: int) -> list[Bound]:
    """Edits of one phase, as edits of that phase's columns."""
    out = []
    for one in bound:
        if one.edit.during == "all":
            out.append(one)
            continue
        columns = torch.arange(prompt_width) if one.edit.during == "prefill" else torch.arange(prompt_width, width)
        always = dataclasses.replace(one.edit, during="all")
        if one.columns is None:
            out.append(dataclasses.replace(one, edit=always, columns=columns.expand(batch_size, -1)))
        elif one.edit.during == "prefill":  # named positions are the prompt's
            out.append(dataclasses.replace(one, edit=always))
    return out


def _longer(batch: Batch, chosen: Tensor) -> Batch:
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    ids = torch.cat([batch.input_ids, chosen[:, None].to(batch.input_ids.device)], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(batch.attention_mask[:, :1])], dim=1)
    return Batch(
        ids, mask, tuple(_grown(p, int(t)) for p, t in zip(batch.prompts, chosen, strict=True)), batch.pads, batch.extra
    )


def _grown(prompt: Any, token: int) -> Any:
    return type(prompt)((*prompt.ids, token), prompt.spans, prompt.text)


def _end_tokens(subject: Subject) -> Tensor:
    config = getattr(subject.model, "generation_config", None) or subject.config
    ends = getattr(config, "eos_token_id", None)
    ends = [] if ends is None else ends
    return torch.tensor(ends if isinstance(ends, list) else [ends], dtype=torch.long)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, places = probabilities.sort(descending=True)
        # a token stays while the mass before it is below top_p, so the most probable always stays
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
