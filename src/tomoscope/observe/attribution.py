"""Direct logit attribution: how much of a logit difference each part of the model writes directly.

The last stream is a sum of what every part wrote. With the final norm's scale frozen at its value, the rest of the way
to a logit is linear, so the difference between two logits is a sum of one number per part: embeddings, each attention,
each MLP, each head (`by_head`), each neuron (`by_neuron`), and the biases. Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"; Wang et al. 2022, arXiv:2211.00593.

How it can mislead: it is the *direct* path only; a head that matters through later layers shows nothing. The frozen
scale hides parts that act by changing the norm's scale. A logit difference has no use for what is written equally for
both tokens. In soft-capped models (Gemma 2) the difference is the one before the cap (`softcapped` says so), which is
larger. Self-repair: a large part, ablated, may change the answer by less than its number here.

Steps: read every write at the positions asked for; take the direction u that the end of the model reads
(logit_direction.py); a part's number is its write times u. `error` is how far the parts are from the model's own logit
difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.model.weights import Weights
from tomoscope.observe.lens import stream_sites
from tomoscope.observe.logit_direction import Branch, find_branch, find_end, probe, tolerance
from tomoscope.observe.samples import At, stream_samples, token_ids


@dataclass(frozen=True)
class LogitAttribution:
    """A logit difference as a sum over parts.

    Attributes:
        names: "embed", "pos_embed" (if positions are embedded), "layer.N.attn.out", "layer.N.mlp.out", "layer.N.rest"
            (what a block adds beyond these: a mixer of another kind, a second MLP; only where there is such a thing),
            "bias" (of the final norm and the unembedding).
        values: [part, sample], in logits.
        total: [sample], the model's own logit difference (before a soft-cap).
        error: largest absolute gap between the parts' sum and the total, over samples.
        softcapped: whether the model caps its logits after this sum.
        prompt: [sample], index of the sample's prompt.
        position: [sample], counted from the prompt's first token.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "part sample"]
    total: Float[Tensor, " sample"]
    error: float
    softcapped: bool
    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]


@dataclass(frozen=True)
class UnitAttribution:
    """The writes of some layers split further, into heads or neurons.

    Attributes:
        unit: "head" or "neuron".
        layers: the layers split (those that can be).
        values: [layer, unit, sample], in logits; 0 beyond the units of a layer that has fewer than another.
        bias: [layer, sample], what the branch adds whatever its units do (the bias of its output projection).
        written: [layer, sample], the whole branch's number; values summed over units plus bias equal it.
        error: largest absolute gap in that sum.
        missing: layer -> why it could not be split.
        prompt: [sample], index of the sample's prompt.
        position: [sample], counted from the prompt's first token.
    """

    unit: str
    layers: tuple[int, ...]
    values: Float[Tensor, "layer unit sample"]
    bias: Float[Tensor, "layer sample"]
    written: Float[Tensor, "layer sample"]
    error: float
    missing: dict[int, str]
    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]


def direct_logit_attribution(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " prompt"],
    wrong: Sequence[int] | Int[Tensor, " prompt"] | None = None,
    *,
    at: At = "last",
) -> LogitAttribution:
    """Split logit(answer) - logit(wrong) into what each part of the model writes directly.

    Args:
        subject: an opened decoder or encoder whose stream is a sum of its writes.
        prompts: prompts, as for `Subject.read`.
        answers: one token id per prompt.
        wrong: one token id per prompt; None compares the answer with the mean over the vocabulary.
        at: positions, as for `Subject.read`.

    Raises:
        UnavailableSiteError: the stream is not a sum (post-norm families), or the end of the model is not norm, matrix
            and scale; the message says which.
        DataError: answers that do not fit the prompts.
    """
    prompts, right, other = _checked(subject, prompts, answers, wrong)
    end, known = find_end(subject), subject.sites()
    starts = [site for site in ("embed", "pos_embed") if known[site].available]
    writes = write_sites(subject)
    streams = stream_sites(subject)
    sites = (*starts, *streams, *(site for layer in writes for site in layer), *end.sites, "logits")
    pieces: list[tuple[list[str], Tensor, Tensor, Any]] = []
    gaps = torch.zeros(len(writes))
    for activations, samples in stream_samples(subject, prompts, *sites, at=at):
        value = {site: samples.take(activations[site]).double().cpu() for site in sites}
        names, parts = _start_parts(value, starts)
        for layer, layer_sites in enumerate(writes):
            rest = value[streams[layer + 1]] - value[streams[layer]] - sum(value[site] for site in layer_sites)
            gaps[layer] = max(float(gaps[layer]), float(rest.norm() / value[streams[layer + 1]].norm()))
            names += [*layer_sites, f"layer.{layer}.rest"]
            parts += [*(value[site] for site in layer_sites), rest]
        foil = _pick(other, samples.prompt)
        direction, bias = end.direction(value[streams[-1]], value.get("norm.final"), right[samples.prompt], foil)
        numbers = torch.stack([(part * direction).sum(-1) for part in parts] + [bias])
        total = end.logit_difference(value["logits"], right[samples.prompt], foil)
        pieces.append(([*names, "bias"], numbers, total, samples))
    values, total = torch.cat([p[1] for p in pieces], -1), torch.cat([p[2] for p in pieces])
    # what rounding leaves of a block whose writes are all known is no part
    closed = {f"layer.{layer}.rest" for layer, gap in enumerate(gaps.tolist()) if gap <= tolerance(subject.dtype)}
    kept = [index for index, name in enumerate(pieces[0][0]) if name not in closed]
    values = values[kept]
    return LogitAttribution(
        names=tuple(pieces[0][0][index] for index in kept),
        values=values.float(),
        total=total.float(),
        error=float((values.sum(0) - total).abs().max()),
        softcapped=end.softcap is not None,
        prompt=torch.cat([p[3].prompt for p in pieces]),
        position=torch.cat([p[3].position for p in pieces]),
    )


def by_head(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " prompt"],
    wrong: Sequence[int] | Int[Tensor, " prompt"] | None = None,
    *,
    at: At = "last",
) -> UnitAttribution:
    """Split every attention's number of `direct_logit_attribution` into its heads; arguments and errors as there."""
    return _by_unit(subject, prompts, answers, wrong, at, "head")


def by_neuron(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " prompt"],
    wrong: Sequence[int] | Int[Tensor, " prompt"] | None = None,
    *,
    at: At = "last",
) -> UnitAttribution:
    """Split every MLP's number of `direct_logit_attribution` into its neurons; arguments and errors as there.

    A mixture of experts has no one hidden layer; its layers are in `missing`.
    """
    return _by_unit(subject, prompts, answers, wrong, at, "neuron")


def write_sites(subject: Any) -> list[list[str]]:
    """The sites that write to the residual stream, by layer; an empty list where a block's writes are not known."""
    known = subject.sites()
    names = [[f"layer.{layer}.{part}" for part in ("attn.out", "mlp.out")] for layer in range(subject.facts.n_layers)]
    return [[site for site in layer if known[site].available] for layer in names]


def check_stream(subject: Any) -> None:
    """Raise UnavailableSiteError where there is no stream, or its last value is not a sum of what was written."""
    stream_sites(subject)
    if subject.facts.renormalised:
        raise UnavailableSiteError(
            f"{subject.name} ({subject.facts.family}) normalises its stream after every write, so the last stream is "
            "not a sum of what its parts wrote and a logit can't be attributed to them directly.",
            remedy="Patch the parts instead, or use gradient x input.",
        )


def _checked(subject: Any, prompts: Sequence[Any], answers: Any, wrong: Any) -> tuple[list[Any], Tensor, Tensor | None]:
    check_stream(subject)
    prompts = list(prompts)
    if not prompts:
        raise DataError("Attribution was given no prompts.", remedy="Give at least one.")
    vocab = subject.facts.d_vocab
    right = token_ids(answers, len(prompts), what="answers", vocab=vocab)
    return prompts, right, None if wrong is None else token_ids(wrong, len(prompts), what="wrong answers", vocab=vocab)


def _pick(ids: Tensor | None, prompt: Tensor) -> Tensor | None:
    return None if ids is None else ids[prompt]


def _start_parts(value: dict[str, Tensor], starts: list[str]) -> tuple[list[str], list[Tensor]]:
    """The stream before the first block, as token and position embeddings where it is their sum, else as one part."""
    start = value["layer.0.resid_pre"]
    summed = sum((value[site] for site in starts), torch.zeros_like(start))
    if starts and (summed - start).abs().max() <= 1e-5 * start.abs().max():
        return list(starts), [value[site] for site in starts]
    return ["embed"], [start]


def _by_unit(subject: Any, prompts: Sequence[Any], answers: Any, wrong: Any, at: At, unit: str) -> UnitAttribution:
    prompts, right, other = _checked(subject, prompts, answers, wrong)
    end = find_end(subject)
    branches, missing = _branches(subject, unit)
    if not branches:
        raise UnavailableSiteError(
            f"No layer of {subject.name} can be split into {unit}s: {next(iter(missing.values()), 'no such branch')}.",
        )
    last = stream_sites(subject)[-1]
    sites = [last, *end.sites, *(site for branch in branches.values() for site in (branch.unit_site, branch.out_site))]
    pieces: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    for activations, samples in stream_samples(subject, prompts, *sites, at=at):
        value = {site: samples.take(activations[site]).double().cpu() for site in sites}
        foil = _pick(other, samples.prompt)
        direction, _ = end.direction(value[last], value.get("norm.final"), right[samples.prompt], foil)
        split = [
            branch.split(value[branch.unit_site], value[branch.out_site], direction) for branch in branches.values()
        ]
        written = [(value[branch.out_site] * direction).sum(-1) for branch in branches.values()]
        units = torch.nn.utils.rnn.pad_sequence([numbers for numbers, _ in split], batch_first=True)
        pieces.append((units, torch.stack([constant for _, constant in split]), torch.stack(written), samples))
    values, bias, whole = (torch.cat([piece[i] for piece in pieces], -1) for i in range(3))
    return UnitAttribution(
        unit=unit,
        layers=tuple(branches),
        values=values.float(),
        bias=bias.float(),
        written=whole.float(),
        error=float((values.sum(1) + bias - whole).abs().max()),
        missing=missing,
        prompt=torch.cat([piece[3].prompt for piece in pieces]),
        position=torch.cat([piece[3].position for piece in pieces]),
    )


def _branches(subject: Any, unit: str) -> tuple[dict[int, Branch], dict[int, str]]:
    """How each layer's units become its write, from one probe; and why some layers can't be split."""
    known, found, missing = subject.sites(), {}, {}
    unit_part, out_part = ("attn.result", "attn.out") if unit == "head" else ("mlp.post", "mlp.out")
    for layer in range(subject.facts.n_layers):
        names = [f"layer.{layer}.{part}" for part in (unit_part, out_part)]
        lacking = [
            known[name].reason if name in known else "no such site"
            for name in names
            if name not in known or not known[name].available
        ]
        if lacking:
            missing[layer] = lacking[0]
            continue
        matrix = None
        if unit == "neuron":
            matrix = Weights(subject).W_out[layer].double().cpu()
        found[layer] = (names[0], names[1], matrix)
    if found:
        activations, samples = probe(subject, *(name for entry in found.values() for name in entry[:2]))
        for layer, (unit_site, out_site, matrix) in list(found.items()):
            units, out = (samples.take(activations[site]).double().cpu() for site in (unit_site, out_site))
            branch = find_branch(unit_site, out_site, units, out, matrix, subject.dtype)
            if branch is None:
                missing[layer] = f"{out_site} is not a scaled or normalised sum of the {unit}s' writes"
                del found[layer]
            else:
                found[layer] = branch
    return found, missing
