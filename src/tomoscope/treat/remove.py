"""Parts taken out of a model for good: heads, neurons and directions, as treatments of its weights.

    remove_heads(subject, [(5, 3)])                  # what head 5.3 writes is 0 from now on
    remove_heads(subject, [(5, 3)], texts=corpus)    # ... is its mean over the corpus from now on
    remove_neurons(subject, [(2, 17)])
    remove_parts(subject, heads=[(5, 3)], neurons=[(2, 17)])
    remove_directions(subject, [direction])          # nothing is written along it (orthogonalisation)

Each gives a `Treatment`: nothing changes until it is applied, and it is undone to the bit. Zero ablation empties the
part's rows of the output projection; mean ablation also adds what the part writes on average to the projection's bias.

How it can mislead: later parts may take over what a removed one did (Hydra effect, McGrath et al. 2023), so that a part
that matters seems not to; zero is far from what later parts usually see, the mean is nearer. A direction is removed at
every layer, not only where it was found.
Source: Michel et al. 2019 (arXiv:1905.10650), heads; Arditi et al. 2024 (arXiv:2406.11717), directions.

Steps: find the projection and the part's rows in it; new weights (and bias); the difference as a treatment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tomoscope.concepts.direction import Direction
from tomoscope.errors import EditError
from tomoscope.model import Subject
from tomoscope.treat.bake import orthogonalised
from tomoscope.treat.treatment import Treatment, difference

AT_A_TIME = 32


def remove_heads(
    subject: Subject, heads: Sequence[tuple[int, int]], *, texts: Sequence[str] | None = None
) -> Treatment:
    """Take attention heads out.

    Args:
        subject: the model.
        heads: (layer, head) of query heads, from 0.
        texts: over whose tokens the mean of each head is taken, which is put in its place; None for zero.

    Raises:
        EditError: no such head, no projection that was recognised, or a mean where the projection has no bias.
    """
    after, mean = _without_heads(subject, heads, texts)
    return _treatment(subject, after, "remove heads", _heads(heads), mean)


def remove_neurons(
    subject: Subject, neurons: Sequence[tuple[int, int]], *, texts: Sequence[str] | None = None
) -> Treatment:
    """Take neurons of MLPs out; as `remove_heads`, with (layer, neuron)."""
    after, mean = _without_neurons(subject, neurons, texts)
    return _treatment(subject, after, "remove neurons", _neurons(neurons), mean)


def remove_parts(
    subject: Subject, heads: Sequence[tuple[int, int]] = (), neurons: Sequence[tuple[int, int]] = ()
) -> Treatment:
    """Heads and neurons set to zero by one treatment; see `remove_heads` and `remove_neurons`."""
    after = _without_heads(subject, heads)[0] | _without_neurons(subject, neurons)[0]
    return _treatment(subject, after, "remove parts", [*_heads(heads), *_neurons(neurons)], False)


def _without_heads(
    subject: Subject, heads: Sequence[tuple[int, int]], texts: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], bool]:
    """New values of parameters, and whether means stand in."""
    facts = subject.facts
    for layer, head in heads:
        _check_place("head", layer, head, facts.n_layers, facts.n_heads)
    width = facts.head_dim or 1
    rows = {
        layer: torch.cat([torch.arange(h * width, (h + 1) * width) for at, h in heads if at == layer])
        for layer in sorted({layer for layer, _ in heads})
    }
    means = {} if texts is None else _means(subject, [f"layer.{layer}.attn.z" for layer in rows], texts)
    paths = {layer: subject.structure.blocks[layer].projection for layer in rows}
    given = {layer: means[f"layer.{layer}.attn.z"] for layer in rows} if means else {}
    return _emptied(subject, paths, rows, given), bool(given)


def _without_neurons(
    subject: Subject, neurons: Sequence[tuple[int, int]], texts: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], bool]:
    """As `_without_heads`."""
    for layer, neuron in neurons:
        if not 0 <= layer < subject.facts.n_layers:
            _check_place("neuron", layer, neuron, subject.facts.n_layers, 0)
        wide = _inputs(_module(subject, subject.structure.blocks[layer].down, f"layer.{layer}'s MLP"))
        _check_place("neuron", layer, neuron, subject.facts.n_layers, wide)
    rows = {
        layer: torch.tensor([n for at, n in neurons if at == layer])
        for layer in sorted({layer for layer, _ in neurons})
    }
    means = {} if texts is None else _means(subject, [f"layer.{layer}.mlp.post" for layer in rows], texts)
    given = {layer: means[f"layer.{layer}.mlp.post"] for layer in rows} if means else {}
    paths = {layer: subject.structure.blocks[layer].down for layer in rows}
    return _emptied(subject, paths, rows, given), bool(given)


def _heads(places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "head": head} for layer, head in places]


def _neurons(places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "neuron": neuron} for layer, neuron in places]


def remove_directions(subject: Subject, directions: Sequence[Direction | Tensor]) -> Treatment:
    """Write nothing along some directions of the stream, at any layer (`bake.orthogonalised`), as a treatment.

    Raises:
        EditError: see `orthogonalised`.
    """
    made = orthogonalised(subject, directions)
    before = dict(subject.model.named_parameters(remove_duplicate=False))
    after = {name: value for name, value in made.model.named_parameters(remove_duplicate=False) if name in before}
    tied = _tied(subject.model)
    if tied:  # the unembedding keeps what it was, in weights of its own
        head: Any = made.model.get_output_embeddings()  # ty: ignore[not-callable]
        after = {name: value for name, value in after.items() if value is not head.weight}
    said = [
        {"concept": d.concept, "site": d.site, "method": d.method}
        if isinstance(d, Direction)
        else {"vector": [round(float(x), 6) for x in d]}
        for d in directions
    ]
    return difference(subject, after, method="remove directions", requests=said, untie=tied)


def _tied(model: Any) -> bool:
    inner, head = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output"))
    return inner is not None and head is not None and inner.weight is getattr(head, "weight", None)


# ---- parts of projections


def _emptied(
    subject: Subject, paths: Mapping[int, str], rows: Mapping[int, Tensor], means: Mapping[int, Float[Tensor, " input"]]
) -> dict[str, Tensor]:
    """New values of the projections' parameters."""
    after: dict[str, Tensor] = {}
    for layer, path in paths.items():
        module = _module(subject, path, f"layer.{layer}")
        weight: Tensor = module.weight.detach().clone()  # ty: ignore
        by_row = type(module).__name__ == "Conv1D"  # transformers' Conv1D is [input, output]
        mine = rows[layer].to(weight.device)
        written = weight[mine] if by_row else weight[:, mine].T  # [part, output]
        if layer in means:
            bias = getattr(module, "bias", None)
            if not isinstance(bias, Tensor):
                raise EditError(
                    f"{path} has no bias, so a mean can't stand in for what is removed.",
                    remedy="Remove to zero (no texts), or ablate with an edit.",
                )
            mean = means[layer].to(weight.device)[mine]
            after[f"{path}.bias"] = (bias.double() + mean.double() @ written.double()).to(bias.dtype)
        if by_row:
            weight[mine] = 0
        else:
            weight[:, mine] = 0
        after[f"{path}.weight"] = weight
    return after


def _treatment(
    subject: Subject, after: Mapping[str, Tensor], method: str, said: Sequence[Mapping[str, Any]], mean: bool
) -> Treatment:
    if not said:
        raise EditError("Nothing to remove.", remedy="Name at least one part.")
    settings = {"in_their_place": "mean" if mean else "zero"}
    return difference(subject, after, method=method, requests=said, settings=settings)


def _module(subject: Subject, path: str, what: str) -> nn.Module:
    module = subject.model.get_submodule(path) if path else None
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise EditError(f"{what} has no output projection that was recognised.", remedy="Ablate with an edit instead.")
    return module


def _inputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1])


def _check_place(kind: str, layer: int, index: int, layers: int, count: int) -> None:
    if not 0 <= layer < layers:
        raise EditError(f"There is no layer {layer}.", remedy=f"Layers are 0 to {layers - 1}.")
    if not 0 <= index < count:
        raise EditError(f"Layer {layer} has no {kind} {index}.", remedy=f"They are 0 to {count - 1}.")


@torch.no_grad()
def _means(subject: Subject, sites: Sequence[str], texts: Sequence[str]) -> dict[str, Float[Tensor, " input"]]:
    """The mean over all real tokens of what each projection is given."""
    if not texts:
        raise EditError("A mean over no text.", remedy="Give texts, or remove to zero.")
    sums: dict[str, Tensor] = {}
    count = 0
    for start in range(0, len(texts), AT_A_TIME):
        batch = subject.tokens(list(texts[start : start + AT_A_TIME]))
        acts = subject.read(batch, *sites)
        mask = batch.mask.cpu()
        count += int(mask.sum())
        for site in sites:
            total = acts[site].flatten(2)[mask].double().sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: total / count for site, total in sums.items()}
