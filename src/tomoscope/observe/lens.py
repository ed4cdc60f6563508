"""What the model would answer if it stopped at a layer: the logit lens.

At each layer the residual stream is put through the model's own end (final norm, unembedding, logit scale and soft-cap,
by `Subject.unembed`) and compared with the model's final distribution. With a `TunedLens` (tuned_lens.py) the stream
first passes that layer's learned affine translator. nostalgebraist, "interpreting GPT: the logit lens" (2020); Belrose
et al. 2023, arXiv:2303.08112.

How it can mislead: the plain lens assumes that a layer's basis is already the last layer's, which fails at early layers
of many families (BLOOM, OPT, GPT-Neo): a large KL there may mean "written in another basis", not "not yet known". That
an answer can be read off at a layer is no evidence that later layers use it: that takes a patch.

Steps: read the streams and the logits in one pass, translate, unembed a few rows at a time (memory is bounded by
`chunk_bytes`, not by layers x vocabulary), compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.observe.samples import At, stream_samples, token_ids

CHUNK_BYTES = 128 << 20


@runtime_checkable
class Translator(Protocol):
    """What `logit_lens(lens=...)` takes: a learned map of some streams to the last layer's basis."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The streams that it translates."""
        ...

    def translate(self, site: str, stream: Float[Tensor, "sample d_model"]) -> Float[Tensor, "sample d_model"]:
        """One site's stream in the last layer's basis."""
        ...


@dataclass(frozen=True)
class LensReading:
    """What each layer's stream decodes to.

    Attributes:
        sites: the streams read: "layer.0.resid_pre" (before any block), then every "layer.N.resid_post".
        prompt: [sample], index of the sample's prompt.
        position: [sample], counted from the prompt's first token.
        kl: [site, sample], KL(final || lens) in nats; 0 at the last site.
        entropy: [site, sample], entropy of the lens's distribution in nats.
        top: [site, sample], the lens's most probable token.
        agreement: [site, sample], whether that is the final distribution's most probable token.
        final_entropy: [sample], entropy of the final distribution in nats.
        answer_probability: [site, sample], probability of the prompt's answer, or None where no answers were given.
        answer_rank: [site, sample], number of tokens more probable than the answer, or None.
    """

    sites: tuple[str, ...]
    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]
    kl: Float[Tensor, "site sample"]
    entropy: Float[Tensor, "site sample"]
    top: Int[Tensor, "site sample"]
    agreement: Bool[Tensor, "site sample"]
    final_entropy: Float[Tensor, " sample"]
    answer_probability: Float[Tensor, "site sample"] | None = None
    answer_rank: Int[Tensor, "site sample"] | None = None


def stream_sites(subject: Any) -> tuple[str, ...]:
    """The sites that a lens reads, in order: the stream before the first block and after each.

    Raises:
        UnavailableSiteError: the model has no stack of blocks that hand on one stream.
    """
    if not subject.facts.n_layers:
        raise UnavailableSiteError(
            f"{subject.name} ({subject.facts.family}) is no stack of blocks that hand on one stream, so it has no "
            "residual stream to look at.",
            remedy="Read its modules by their paths.",
        )
    return ("layer.0.resid_pre", *(f"layer.{layer}.resid_post" for layer in range(subject.facts.n_layers)))


def row_chunks(rows: int, vocab: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of rows whose logits in float32 take at most `chunk_bytes` (at least one row each)."""
    step = max(1, chunk_bytes // (4 * vocab))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def kl_divergence(final: Float[Tensor, "*batch vocab"], lens: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """KL(final || lens) in nats, of two arrays of logarithmic probabilities."""
    return (final.exp() * (final - lens)).sum(-1).clamp(min=0)  # rounding can leave it a hair below 0


def _compare(
    lens: Float[Tensor, "sample vocab"], final: Float[Tensor, "sample vocab"], answer: Int[Tensor, " sample"] | None
) -> dict[str, Tensor]:
    out = {"kl": kl_divergence(final, lens), "entropy": -(lens.exp() * lens).sum(-1), "top": lens.argmax(-1)}
    out["agreement"] = out["top"] == final.argmax(-1)
    out["final_entropy"] = -(final.exp() * final).sum(-1)
    if answer is not None:
        own = lens.gather(-1, answer[:, None])
        out["answer_probability"] = own[:, 0].exp()
        out["answer_rank"] = (lens > own).sum(-1)
    return out


@torch.no_grad()
def logit_lens(
    subject: Any,
    prompts: Sequence[Any],
    *,
    answers: Sequence[int] | Int[Tensor, " prompt"] | None = None,
    at: At = "last",
    lens: Translator | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> LensReading:
    """Decode the residual stream after every block and compare it with the final distribution.

    Args:
        subject: an opened model with an unembedding.
        prompts: prompts, as for `Subject.read`.
        answers: one token id per prompt, whose probability and rank are wanted.
        at: positions, as for `Subject.read`; None takes every token as a sample.
        lens: a tuned lens, to translate each stream before it is decoded.
        chunk_bytes: bound on the memory that logits take at once.

    Raises:
        DataError: no prompts, or as many answers as prompts were not given.
        UnavailableSiteError: a model without an unembedding or without streams, or whose logits are not its last
            stream decoded (measured in every call).
    """
    prompts = list(prompts)
    if not prompts:
        raise DataError("The lens was given no prompts.", remedy="Give at least one.")
    ids = None if answers is None else token_ids(answers, len(prompts), what="answers", vocab=subject.facts.d_vocab)
    sites = stream_sites(subject)
    batches: list[dict[str, Tensor]] = []
    for activations, samples in stream_samples(subject, prompts, *sites, "logits", at=at):
        streams = {site: samples.take(activations[site]) for site in sites}
        if lens is not None:
            streams |= {site: lens.translate(site, streams[site]) for site in sites if site in lens.sites}
        logits = samples.take(activations["logits"])
        answer = None if ids is None else ids[samples.prompt]
        batch = _decode(subject, streams, logits, answer, chunk_bytes)
        batches.append(batch | {"prompt": samples.prompt, "position": samples.position})
    whole = {key: torch.cat([batch[key] for batch in batches], dim=-1) for key in batches[0]}
    _check_end(subject, whole["kl"][-1])
    return LensReading(sites=sites, **whole)


def _check_end(subject: Any, kl: Float[Tensor, " sample"]) -> None:
    """The last stream, decoded, must be the model's own answer; else no row of the lens means anything."""
    gap = float(kl.abs().max())
    if gap > (1e-3 if subject.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UnavailableSiteError(
            f"Decoding the last stream of {subject.name} does not give its own logits (KL {gap:.2g} nats): its end "
            "reads more than that stream, so a logit lens does not apply."
        )


def _decode(
    subject: Any, streams: dict[str, Tensor], logits: Tensor, answer: Tensor | None, chunk_bytes: int
) -> dict[str, Tensor]:
    """Compare every site's decoded stream with the final logits; [site, sample] each."""
    pieces: list[dict[str, Tensor]] = []
    count, vocab = logits.shape
    for rows in row_chunks(count, 2 * vocab, chunk_bytes):
        final = logits[rows].float().log_softmax(-1)
        chunk = None if answer is None else answer[rows]
        columns = []
        for stream in streams.values():
            decoded = subject.unembed(stream[rows]).float().cpu().log_softmax(-1)
            columns.append(_compare(decoded, final, chunk))
        piece = {key: torch.stack([column[key] for column in columns]) for key in columns[0]}
        pieces.append(piece | {"final_entropy": piece["final_entropy"][0]})
    return {key: torch.cat([piece[key] for piece in pieces], dim=-1) for key in pieces[0]}
