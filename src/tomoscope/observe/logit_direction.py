"""What the end of a model reads from the stream, as an explicit linear map: found from its values, not from its class.

The end is y = norm(x), logits = c y W_U + b, perhaps soft-capped. With the norm's scale frozen at its value for a
sample, each logit difference is x . u + constant. Which norm it is (RMS or layer norm, with or without a bias, Gemma's
1 + w) is told by regressing the norm's output on each candidate's normalised input over a probe of random tokens: the
slope of each channel is its weight, whatever the module calls it, and the candidate must reproduce the output to the
dtype's precision. The same regression tells how a branch's units (heads, neurons) become its write: as they are, times
a constant (Granite), or through a norm at the branch's end (Gemma 2, OLMo 2), whose scale is frozen too.

How it can mislead: a channel that is nearly constant over the probe has an ill-determined weight where there is also a
bias; their sum is right, but the split between the channel's writers and the bias is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import UnavailableSiteError
from tomoscope.model.families import SOFTCAP_NAMES
from tomoscope.model.weights import Weights
from tomoscope.observe.lens import stream_sites
from tomoscope.observe.samples import Samples, samples_of

PROBE_PROMPTS, PROBE_TOKENS = 8, 12
VOCAB_CHUNK = 8192  # columns of the unembedding taken to float64 at once
EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3)


@dataclass(frozen=True)
class NormMap:
    """A norm as weight x (x or x - mean(x)) x scale + bias, the scale depending on the sample.

    Attributes:
        weight: [d_model].
        bias: [d_model].
        centred: whether the mean is removed (layer norm).
        error: largest gap to the module's own output, relative to its largest value.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    error: float

    def scale(self, stream: Float[Tensor, "sample d_model"], out: Float[Tensor, "sample d_model"]) -> Tensor:
        """[sample], the scale that this norm used, from what went in and what came out."""
        shaped = self.weight * (stream - stream.mean(-1, keepdim=True) if self.centred else stream)
        return ((out - self.bias) * shaped).sum(-1) / shaped.square().sum(-1).clamp(min=1e-300)

    def pull(self, direction: Float[Tensor, "sample d_model"], scale: Float[Tensor, " sample"]) -> Tensor:
        """The direction in the stream that a direction in the norm's output reads, at a frozen scale."""
        weighted = self.weight * direction
        if self.centred:
            weighted = weighted - weighted.mean(-1, keepdim=True)
        return weighted * scale[:, None]


@dataclass(frozen=True)
class End:
    """The end of a model: final norm, unembedding, logit scale, bias, soft-cap.

    Attributes:
        norm: the final norm, or None where the unembedding reads the stream itself.
        unembedding: [d_model, vocab], the model's own weights.
        factor: the logit scale.
        bias: [vocab].
        softcap: the cap, or None.
    """

    norm: NormMap | None
    unembedding: Float[Tensor, "d_model vocab"]
    factor: float
    bias: Float[Tensor, " vocab"]
    softcap: float | None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that `direction` needs beside the last stream."""
        return () if self.norm is None else ("norm.final",)

    def direction(
        self,
        stream: Float[Tensor, "sample d_model"],
        normed: Float[Tensor, "sample d_model"] | None,
        answer: Int[Tensor, " sample"],
        wrong: Int[Tensor, " sample"] | None,
    ) -> tuple[Float[Tensor, "sample d_model"], Float[Tensor, " sample"]]:
        """U and the constant of: logit(answer) - logit(wrong) = stream . u + constant, before a soft-cap."""
        other = self.unembedding.double().mean(1).cpu() if wrong is None else self._column(wrong)
        other_bias = self.bias.mean() if wrong is None else self.bias[wrong]
        read, constant = (self._column(answer) - other) * self.factor, self.bias[answer] - other_bias
        if self.norm is None or normed is None:
            return read, constant
        return self.norm.pull(read, self.norm.scale(stream, normed)), constant + read @ self.norm.bias

    def _column(self, token: Int[Tensor, " sample"]) -> Float[Tensor, "sample d_model"]:
        return self.unembedding[:, token.to(self.unembedding.device)].T.double().cpu()

    def logit_difference(
        self,
        logits: Float[Tensor, "sample vocab"],
        answer: Int[Tensor, " sample"],
        wrong: Int[Tensor, " sample"] | None,
    ) -> Float[Tensor, " sample"]:
        """[sample], the model's own difference, its soft-cap undone."""
        exact = uncapped(logits, self.softcap)
        own = exact.gather(-1, answer[:, None])[:, 0]
        return own - (exact.mean(-1) if wrong is None else exact.gather(-1, wrong[:, None])[:, 0])


@dataclass(frozen=True)
class Branch:
    """How a branch's units become its write: write = (sum of units [@ matrix]) through `factor` or `norm`, plus bias.

    Attributes:
        unit_site, out_site: the sites of the units and of the write.
        matrix: [unit, d_model], what each unit writes per unit of activation (neurons), or None (heads write vectors).
        factor: constant factor of the write; 1 but for scaled residuals.
        bias: [d_model], added whatever the units do.
        norm: the norm at the branch's end, or None.
    """

    unit_site: str
    out_site: str
    matrix: Float[Tensor, "unit d_model"] | None
    factor: float
    bias: Float[Tensor, " d_model"]
    norm: NormMap | None

    def split(
        self, units: Tensor, out: Float[Tensor, "sample d_model"], direction: Float[Tensor, "sample d_model"]
    ) -> tuple[Float[Tensor, "unit sample"], Float[Tensor, " sample"]]:
        """[unit, sample] and [sample]: the units' numbers and the bias's, for the direction read from the write."""
        if self.norm is None:
            pulled, constant = direction * self.factor, direction @ self.bias
        else:
            written = _written(units, self.matrix)
            pulled = self.norm.pull(direction, self.norm.scale(written, out))
            constant = direction @ self.norm.bias
        if self.matrix is None:
            return torch.einsum("sud,sd->us", units, pulled), constant
        return (units * (pulled @ self.matrix.T)).T, constant


def tolerance(dtype: torch.dtype) -> float:
    """How closely a map must reproduce the model's own values to be taken for it."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def uncapped(logits: Float[Tensor, "sample vocab"], softcap: float | None) -> Float[Tensor, "sample vocab"]:
    """Logits before a soft-cap, in float64."""
    exact = logits.double().cpu()
    return exact if softcap is None else softcap * torch.atanh((exact / softcap).clamp(-1 + 1e-9, 1 - 1e-9))


def probe(subject: Any, *sites: str) -> tuple[Any, Samples]:
    """Activations on a few random token sequences, and every token as a sample; seeded."""
    vocab, context = subject.facts.d_vocab, subject.facts.context or PROBE_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (PROBE_PROMPTS, min(PROBE_TOKENS, context)), generator=generator)
    activations = subject.read(ids.tolist(), *sites)
    return activations, samples_of(activations.batch, None)


def find_norm(stream: Tensor, out: Tensor, dtype: torch.dtype) -> NormMap | None:
    """Which norm maps one array [sample, d_model] to the other: the simplest candidate that reproduces it, or None."""
    top = float(out.abs().max())
    for centred, biased in ((False, False), (True, False), (True, True), (False, True)):
        base = stream - stream.mean(-1, keepdim=True) if centred else stream
        best: NormMap | None = None
        for epsilon in EPSILONS:
            unit = base / (base.square().mean(-1, keepdim=True) + epsilon).sqrt()
            offset, level = (
                (unit.mean(0), out.mean(0)) if biased else (torch.zeros_like(unit[0]), torch.zeros_like(out[0]))
            )
            weight = ((unit - offset) * (out - level)).sum(0) / (unit - offset).square().sum(0).clamp(min=1e-300)
            bias = level - weight * offset
            error = float((unit * weight + bias - out).abs().max()) / max(top, 1e-30)
            if best is None or error < best.error:
                best = NormMap(weight, bias, centred, error)
        if best is not None and best.error <= tolerance(dtype):
            return best
    return None


def find_end(subject: Any) -> End:
    """The end of a model as an explicit map, checked against its own logits on the probe.

    Raises:
        UnavailableSiteError: the final norm or the head is none of the maps known here.
    """
    last = stream_sites(subject)[-1]
    has_norm = subject.sites()["norm.final"].available
    activations, samples = probe(subject, last, *(["norm.final"] if has_norm else []), "logits")
    stream = samples.take(activations[last]).double().cpu()
    normed = samples.take(activations["norm.final"]).double().cpu() if has_norm else stream
    norm = find_norm(stream, normed, subject.dtype) if has_norm else None
    if has_norm and norm is None:
        raise UnavailableSiteError(f"The final norm of {subject.name} is neither an RMS norm nor a layer norm.")
    softcap = softcap_of(subject.config)
    logits = uncapped(samples.take(activations["logits"]), softcap)
    W_U = Weights(subject).W_U
    plain = torch.cat([normed @ part.double().cpu() for part in W_U.split(VOCAB_CHUNK, dim=1)], dim=1)
    factor, bias, error = _line(plain, logits)
    if error > tolerance(subject.dtype):
        raise UnavailableSiteError(
            f"The logits of {subject.name} are not its final stream times its unembedding (relative gap {error:.2g}), "
            "so they can't be attributed directly.",
            remedy="Heads with hidden layers of their own (masked language models) have no direct path.",
        )
    return End(norm, W_U, factor, bias, softcap)


def softcap_of(config: Any) -> float | None:
    """The soft-cap of the final logits that a config declares, or None."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, name, None) for name in SOFTCAP_NAMES]
    return next((float(value) for value in found if value), None)


def find_branch(
    unit_site: str, out_site: str, units: Tensor, out: Tensor, matrix: Tensor | None, dtype: torch.dtype
) -> Branch | None:
    """How a branch's units became its write on the probe, or None where no map known here reproduces it."""
    written = _written(units, matrix)
    factor, bias, error = _line(written, out)
    if error <= tolerance(dtype):
        return Branch(unit_site, out_site, matrix, factor, bias, None)
    norm = find_norm(written, out, dtype)
    return None if norm is None else Branch(unit_site, out_site, matrix, 1.0, torch.zeros_like(out[0]), norm)


def _written(units: Tensor, matrix: Tensor | None) -> Float[Tensor, "sample d_model"]:
    """What the units write together: heads write vectors, neurons through their row of a matrix."""
    return units.sum(1) if matrix is None else units @ matrix


def _line(x: Tensor, y: Tensor) -> tuple[float, Tensor, float]:
    """Factor, bias per channel and relative error of y = factor x + bias over samples."""
    dx, dy = x - x.mean(0), y - y.mean(0)
    factor = float((dx * dy).sum() / dx.square().sum().clamp(min=1e-300))
    factor = 1.0 if abs(factor - 1) < 1e-5 else factor
    bias = y.mean(0) - factor * x.mean(0)
    scale = float(y.abs().max())
    # what float32 leaves of a bias that is not there would otherwise be reported as one
    if float(bias.abs().max()) < 1e-5 * scale:
        bias = torch.zeros_like(bias)
    return factor, bias, float((factor * x + bias - y).abs().max()) / max(scale, 1e-30)
