"""A removal made part of the weights: a model that cannot write a direction, saved and run without tomoscope.

`orthogonalised(subject, directions)` takes the span of some directions out of everything that writes to the stream
(the embeddings, every attention's and MLP's output, with their biases), as Arditi et al. 2024 (arXiv:2406.11717) do:
from then on the stream has nothing along it at any layer. The result is a copy, with an unembedding of its own where it
was tied to the embedding; `result.model.save_pretrained(folder)` writes a model of the same architecture.

How it can mislead: this removes the direction at every layer, not at the one where it was found; families whose branch
outputs are normed before they are added (Gemma 2) write it again after the norm and are refused, by measuring.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tomoscope.concepts.direction import Direction
from tomoscope.errors import EditError
from tomoscope.model import Subject, build_subject
from tomoscope.model.edits import orthonormal

_LEFT = 1e-3


@torch.no_grad()
def orthogonalised(subject: Subject, directions: Sequence[Direction | Tensor]) -> Subject:
    """A copy of the model that writes nothing along the directions.

    Raises:
        EditError: no direction, one of another width than the stream, or a model that writes along it all the same.
    """
    vectors = [one.unit if isinstance(one, Direction) else torch.as_tensor(one) for one in directions]
    width = subject.facts.d_model
    if not vectors or any(len(vector) != width for vector in vectors):
        raise EditError(
            f"Directions of width {[len(v) for v in vectors]} for a stream of width {width}.",
            remedy="Give directions of the residual stream.",
        )
    basis = orthonormal(torch.stack([vector.double() for vector in vectors]))
    model = copy.deepcopy(subject.model)
    paths = {tap.path for name, tap in subject.structure.taps.items() if name in ("embed", "pos_embed")}
    for block in subject.structure.blocks:
        paths |= {path for path in (block.projection, block.down) if path}
    _untie(model)
    for path in sorted(paths):
        _project(model.get_submodule(path), basis, path)
    made = build_subject(model.eval(), tokenizer=subject.tokenizer, name=f"{subject.name}, orthogonalised")
    _check(made, basis)
    return made


def _untie(model: nn.Module) -> None:
    """Give the unembedding its own weights, which must keep reading what the embedding no longer writes."""
    give_in, give_out = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    head = give_out() if give_out is not None else None
    if head is None or give_in is None or give_in().weight is not getattr(head, "weight", None):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def _project(module: nn.Module, basis: Tensor, path: str) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise EditError(f"{path} has no weight to take a direction out of.", remedy="Use an edit instead.")
    # an embedding's and a Conv1D's rows lie in the stream, a linear layer's columns do
    rows = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    wide = weight.double() if rows else weight.double().T
    if wide.shape[-1] != len(basis):
        raise EditError(f"{path} does not write to the stream directly.", remedy="Use an edit instead.")
    wide = wide - wide @ basis @ basis.T
    weight.copy_((wide if rows else wide.T).to(weight.dtype))
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() - basis @ (basis.T @ bias.double())).to(bias.dtype))


def _check(made: Subject, basis: Tensor) -> None:
    acts = made.read(torch.arange(6)[None] % 6, "layer.*.resid_post")
    for site, value in acts.items():
        share = float((value.double() @ basis).norm() / value.double().norm().clamp(min=1e-30))
        if share > _LEFT:
            raise EditError(
                f"This family writes along the direction all the same ({share:.1%} of the stream at {site}).",
                remedy="Its branches end in a norm or a scale; use an edit instead.",
            )
