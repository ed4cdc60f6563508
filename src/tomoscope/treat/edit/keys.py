"""Keys and values of facts at an MLP's output projection, contexts to average them over, and changes of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.errors import EditError, SiteError
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded
from tomoscope.model.generation import generate_tokens
from tomoscope.treat.edit.requests import EditRequest, encode_labelled
from tomoscope.treat.treatment import LowRank, Treatment

STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True, eq=False)
class Edited:
    """An edit and how it was found.

    Attributes:
        treatment: what to apply.
        keys: layer -> [fact, neuron] keys that were written at.
        wanted: [fact, d_model] what should stand at the edited place.
        losses: [fact, step, part] of the search, see `targets.PARTS`; NaN after a fact is done.
        vectors: of ROME, the rank-one factors: [fact, neuron] and [fact, d_model].
    """

    treatment: Treatment
    keys: dict[int, Float[Tensor, "fact neuron"]]
    wanted: Float[Tensor, "fact d_model"] | None = None
    losses: Float[Tensor, "fact step part"] | None = None
    vectors: tuple[Tensor, Tensor] | None = None
    notes: dict[str, float] = field(default_factory=dict)


def default_layer(subject: Subject) -> int:
    """A third of the way up, where the papers edit (17 of 48, 8 of 24, 5 of 28); `facts.editing` measures others."""
    return min(subject.facts.n_layers - 1, round(subject.facts.n_layers / 3))


def down_projection(subject: Subject, layer: int) -> nn.Module:
    """The module whose input is the key and whose output is the value.

    Raises:
        EditError: no such layer.
        UnavailableSiteError: the layer's MLP has none.
    """
    blocks = subject.structure.blocks
    if not 0 <= layer < len(blocks):
        raise EditError(f"There is no layer {layer}; the model has {len(blocks)}.", remedy="Layers count from 0.")
    subject.resolve([f"layer.{layer}.mlp.post"])
    if not blocks[layer].down:
        raise SiteError(f"layer.{layer} has no output projection that was recognised.")
    return subject.model.get_submodule(blocks[layer].down)


def weight_name(subject: Subject, layer: int) -> str:
    """The parameter that is edited."""
    down_projection(subject, layer)
    return f"{subject.structure.blocks[layer].down}.weight"


def weight_change(
    module: nn.Module, keys: Float[Tensor, "neuron rank"], values: Float[Tensor, "rank d_model"]
) -> LowRank:
    """Keys @ values as a change of a projection's weight: transformers' Conv1D stores [in, out], a linear layer
    [out, in].
    """
    if type(module).__name__ == "Conv1D":
        return LowRank(keys.contiguous(), values.contiguous())
    return LowRank(values.T.contiguous(), keys.T.contiguous())


@torch.no_grad()
def fact_keys(
    subject: Subject,
    requests: Sequence[EditRequest],
    layer: int,
    contexts: Sequence[str] = ("{}",),
    at: str = "subject",
) -> Float[Tensor, "fact context neuron"]:
    """Keys at each subject's last token (or the prompt's last), in each context."""
    rows = [encode_labelled(subject, one.labelled(context), at) for one in requests for context in contexts]
    site = f"layer.{layer}.mlp.post"
    found = subject.read(rows, site, at="edited")[site]
    return found.reshape(len(requests), len(contexts), -1)


def average_keys(keys: Float[Tensor, "fact context neuron"], *, halves: bool) -> Float[Tensor, "fact neuron"]:
    """Mean over contexts; with `halves` the bare prompt weighs as much as all contexts together (MEMIT)."""
    if halves and keys.shape[1] > 1:
        return (keys[:, 0] + keys[:, 1:].mean(1)) / 2
    return keys.mean(1)


def contexts_of(subject: Subject, *, count: int = 10, tokens: int = 8, seed: int = 0) -> tuple[str, ...]:
    """The bare template and `count` beginnings that the model wrote itself, sampled by seed.

    They are kept in the edit's record: an edit is not reproducible without them.
    """
    if count < 1:
        return ("{}",)
    starts = [STARTS[i % len(STARTS)] for i in range(count)]
    rows: list[Encoded] = list(subject.tokens(starts).prompts)
    made = generate_tokens(subject, rows, max_new_tokens=tokens, temperature=1.0, top_p=0.9, seed=seed)
    texts = [f"{start}{subject.tokenizer.decode(ids)}" for start, ids in zip(starts, made, strict=True)]
    cleaned = [" ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(".") for text in texts]
    return ("{}", *(f"{text}. {{}}" for text in dict.fromkeys(cleaned)))
