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
from tomoscope.observe.logit_direction import Branch, find_branch, find_end, probe, tolerance
from tomoscope.observe.samples import At, stream_samples, token_ids


@dataclass(frozen=True)
class LogitAttribution:
    """A logit difference as a sum over parts.

    Attributes:
        names: "embed", "pos_embed" (where positions are embedded), "layer.N.attn.out", "layer.N.mlp.out", "bias" (of
            the final norm and the unembedding).
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
        values: [layer, unit, sample], in logits.
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
        UnavailableSiteError: the stream is not a sum (post-norm families), a write has no site, or the end of the model
            is not norm, matrix and scale; the message says which.
        DataError: answers that do not fit the prompts.
    """
    prompts, right, other = _checked(subject, prompts, answers, wrong)
    writes = write_sites(subject)
    end = find_end(subject)
    starts = [site for site in ("embed", "pos_embed") if subject.sites()[site].available]
    last = f"layer.{subject.facts.n_layers - 1}.resid_post"
    sites = ("layer.0.resid_pre", *starts, *writes, last, "norm.final", "logits")
    pieces: list[tuple[list[str], Tensor, Tensor, Any]] = []
    for activations, samples in stream_samples(subject, prompts, *sites, at=at):
        value = {site: samples.take(activations[site]).double().cpu() for site in sites}
        names, parts = _start_parts(value, starts)
        parts += [value[site] for site in writes]
        _check_sum(torch.stack(parts).sum(0), value[last], subject)
        direction, bias = end.direction(
            value[last], value["norm.final"], right[samples.prompt], _pick(other, samples.prompt)
        )
        numbers = torch.stack([(part * direction).sum(-1) for part in parts] + [bias])
        total = end.logit_difference(value["logits"], right[samples.prompt], _pick(other, samples.prompt))
        pieces.append(([*names, *writes, "bias"], numbers, total, samples))
    values, total = torch.cat([p[1] for p in pieces], -1), torch.cat([p[2] for p in pieces])
    return LogitAttribution(
        names=tuple(pieces[0][0]),
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


def write_sites(subject: Any) -> list[str]:
    """The sites that write to the residual stream, in order.

    Raises:
        UnavailableSiteError: the stream is renormalised after each write, or a block's writes are not known.
    """
    if subject.facts.renormalised:
        raise UnavailableSiteError(
            f"{subject.name} ({subject.facts.family}) normalises its stream after every write, so the last stream is "
            "not a sum of what its parts wrote and a logit can't be attributed to them directly.",
            remedy="Patch the parts instead, or use gradient x input.",
        )
    known = subject.sites()
    sites: list[str] = []
    for layer in range(subject.facts.n_layers):
        here = [f"layer.{layer}.{part}" for part in ("attn.out", "mlp.out")]
        found = [site for site in here if site in known and known[site].available]
        if not found:
            reason = known[here[0]].reason if here[0] in known else "no writer was found"
            raise UnavailableSiteError(f"The writes of block {layer} of {subject.name} are not known: {reason}.")
        sites += found
    return sites


def _checked(subject: Any, prompts: Sequence[Any], answers: Any, wrong: Any) -> tuple[list[Any], Tensor, Tensor | None]:
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


def _check_sum(summed: Tensor, stream: Tensor, subject: Any) -> None:
    gap = float((summed - stream).norm() / stream.norm())
    if gap > tolerance(subject.dtype):
        raise UnavailableSiteError(
            f"The writes of {subject.name} do not add up to its last stream (relative gap {gap:.2g}): some write has "
            "no site, so a logit can't be attributed completely.",
            remedy="`tomoscope sites MODEL` lists what was found.",
        )


def _by_unit(subject: Any, prompts: Sequence[Any], answers: Any, wrong: Any, at: At, unit: str) -> UnitAttribution:
    prompts, right, other = _checked(subject, prompts, answers, wrong)
    write_sites(subject)
    end = find_end(subject)
    branches, missing = _branches(subject, unit)
    if not branches:
        raise UnavailableSiteError(
            f"No layer of {subject.name} can be split into {unit}s: {next(iter(missing.values()), 'no such branch')}.",
        )
    last = f"layer.{subject.facts.n_layers - 1}.resid_post"
    sites = [site for branch in branches.values() for site in (branch.unit_site, branch.out_site)]
    pieces: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    for activations, samples in stream_samples(subject, prompts, *sites, last, "norm.final", at=at):
        value = {site: samples.take(activations[site]).double().cpu() for site in (*sites, last, "norm.final")}
        direction, _ = end.direction(
            value[last], value["norm.final"], right[samples.prompt], _pick(other, samples.prompt)
        )
        split = [
            branch.split(value[branch.unit_site], value[branch.out_site], direction) for branch in branches.values()
        ]
        written = [(value[branch.out_site] * direction).sum(-1) for branch in branches.values()]
        pieces.append(
            (torch.stack([s[0] for s in split]), torch.stack([s[1] for s in split]), torch.stack(written), samples)
        )
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
