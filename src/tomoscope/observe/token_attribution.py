"""Which input tokens an answer depends on, by gradients at the token embeddings.

`gradient`: the length of the gradient of the answer's logit (or logit difference) at each token's embedding. `gradient
x input`: its product with the embedding. `integrated gradients` (Sundararajan et al. 2017, arXiv:1703.01365): the
gradient averaged on the straight line from a baseline to the input, times their difference; its values sum to
metric(input) - metric(baseline), and how far they are from that (the completeness error) is reported for every prompt.

How it can mislead: a gradient is local: a saturated model has none where the token matters. Integrated gradients depend
on the baseline (compare several) and pass through inputs that no text gives. A zero embedding is no token, and where an
RMS norm reads the embedding alone (Llama and kin) the model's answer does not change along the path until it jumps at
its very end, so no number of steps makes it complete: the completeness error then says so. All three hold the
attention's other inputs in the path, so values are not shares of importance; negative is possible.

Steps: read the embeddings, place the rows of the path for one prompt in batches (Gauss-Legendre points), move the
embedding by an edit, take gradients at the embedding in one backward per batch, sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.model import add, replace, zero
from tomoscope.model.weights import Weights
from tomoscope.observe.samples import samples_of, token_ids

BASELINES = ("zero", "pad", "mean")


@dataclass(frozen=True)
class TokenAttribution:
    """A number for each token of each prompt.

    Attributes:
        method: "gradient", "gradient_x_input" or "integrated_gradients".
        values: [batch, position], in units of the metric ("gradient": per unit of the embedding); 0 beyond a prompt.
        mask: [batch, position], True at tokens; positions count from each prompt's first token.
        tokens: [batch, position], token ids; -1 beyond a prompt.
        metric: [batch], the logit (or logit difference) that was explained.
        baseline: "zero", "pad" or "mean" for integrated gradients, else "".
        baseline_metric: [batch], the metric at the baseline, or None.
        completeness_error: [batch], |sum of values - (metric - baseline metric)|, or None.
    """

    method: str
    values: Float[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"]
    tokens: Int[Tensor, "batch position"]
    metric: Float[Tensor, " batch"]
    baseline: str = ""
    baseline_metric: Float[Tensor, " batch"] | None = None
    completeness_error: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class LogitMetric:
    """The metric: logit(answer) at a position, minus logit(wrong) if there are any.

    Attributes:
        answers: [prompt], token ids.
        wrong: [prompt], token ids, or None.
        at: the position whose logits are read.
    """

    answers: Int[Tensor, " prompt"]
    wrong: Int[Tensor, " prompt"] | None
    at: int | str

    def __call__(self, logits: Float[Tensor, "row position vocab"], batch: Any) -> Float[Tensor, " row"]:
        """[row], in logits."""
        columns, _ = batch.columns(self.at)
        here = logits[torch.arange(len(logits)), columns[:, 0]]
        rows = torch.as_tensor(batch.indices).cpu()
        own = here.gather(1, self.answers[rows, None].to(here.device))[:, 0]
        return own if self.wrong is None else own - here.gather(1, self.wrong[rows, None].to(here.device))[:, 0]

    def only(self, prompt: int, rows: int) -> LogitMetric:
        """The metric of one prompt for a batch that holds it several times."""
        wrong = None if self.wrong is None else self.wrong[prompt].expand(rows)
        return LogitMetric(self.answers[prompt].expand(rows), wrong, self.at)


def gradient(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " batch"],
    wrong: Sequence[int] | Int[Tensor, " batch"] | None = None,
    *,
    at: int | str = "last",
) -> TokenAttribution:
    """The length of the metric's gradient at each token's embedding.

    Args:
        subject: an opened language model.
        prompts: prompts, as for `Subject.read`.
        answers: one token id per prompt.
        wrong: one token id per prompt to take the logit difference, or None for the answer's logit alone.
        at: the position whose logits are read.

    Raises:
        DataError: answers that do not fit the prompts, or no prompts.
    """
    return _local(subject, prompts, answers, wrong, at, "gradient")


def gradient_x_input(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " batch"],
    wrong: Sequence[int] | Int[Tensor, " batch"] | None = None,
    *,
    at: int | str = "last",
) -> TokenAttribution:
    """The metric's gradient at each token's embedding, times the embedding; arguments as for `gradient`."""
    return _local(subject, prompts, answers, wrong, at, "gradient_x_input")


def _local(subject: Any, prompts: Any, answers: Any, wrong: Any, at: int | str, method: str) -> TokenAttribution:
    prompts, metric = _with_metric(subject, prompts, answers, wrong, at)
    out = subject.gradients(prompts, metric, ["embed"])
    slope, value = out.gradients["embed"].float().cpu(), out.values["embed"].float().cpu()
    numbers = slope.norm(dim=-1) if method == "gradient" else (slope * value).sum(-1)
    batch, samples = out.values.batch, samples_of(out.values.batch, None)
    rows = [samples.take(numbers)[samples.prompt == row] for row in range(len(batch))]
    ids = samples.take(batch.input_ids.cpu())
    tokens = [ids[samples.prompt == row] for row in range(len(batch))]
    return _padded(method, rows, tokens, out.metric.float().cpu())


def integrated_gradients(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " batch"],
    wrong: Sequence[int] | Int[Tensor, " batch"] | None = None,
    *,
    at: int | str = "last",
    baseline: str = "mean",
    steps: int = 50,
    rows: int = 64,
) -> TokenAttribution:
    """Integrated gradients from a baseline embedding, with the completeness error of each prompt.

    Args:
        subject: an opened language model.
        prompts: prompts, as for `Subject.read`.
        answers: one token id per prompt.
        wrong: one token id per prompt to take the logit difference, or None for the answer's logit alone.
        at: the position whose logits are read.
        baseline: "zero" (embedding 0), "pad" (the padding token, or the end-of-text token, everywhere), or "mean" (the
            mean embedding over the vocabulary).
        steps: Gauss-Legendre points on the path; more of them lower the completeness error.
        rows: points run as one batch.

    Raises:
        DataError: an unknown baseline, no points, or answers that do not fit the prompts.
        UnavailableSiteError: a "mean" baseline where embeddings are not rows of one matrix.
    """
    if baseline not in BASELINES:
        raise DataError(f"baseline={baseline!r} is unknown.", remedy=f"It is one of {', '.join(BASELINES)}.")
    if steps < 1 or rows < 1:
        raise DataError(f"Integrated gradients need at least one step and one row, not {steps} and {rows}.")
    points, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor((1 + points) / 2, dtype=torch.float32)
    shares = torch.tensor(weights / 2, dtype=torch.float32)
    prompts, metric = _with_metric(subject, prompts, answers, wrong, at)
    values, ends, tokens = [], [], []
    for index, prompt in enumerate(prompts):
        read = subject.read([prompt], "embed")
        ids, value = read.batch.input_ids[0].cpu(), read["embed"][0].float().cpu()
        origin = _baseline(subject, baseline, ids, value)
        gap, total = value - origin, torch.zeros_like(value)
        for low in range(0, steps, rows):
            path = origin + alphas[low : low + rows, None, None] * gap
            # written as 0 x embedding + path, which is exact and leaves the embedding in the graph
            moved = [zero("embed"), add("embed", path)]
            out = subject.gradients([prompt] * len(path), metric.only(index, len(path)), ["embed"], edits=moved)
            total += torch.einsum("r,rpd->pd", shares[low : low + rows], out.gradients["embed"].float().cpu())
        run = subject.run([prompt] * 2, edits=[replace("embed", torch.stack([value, origin]))])
        ends.append(metric.only(index, 2)(run.logits, run.batch).float().cpu())
        values.append((total * gap).sum(-1))
        tokens.append(ids)
    end, start = torch.stack(ends).unbind(1)
    sums = torch.stack([value.sum() for value in values])
    return _padded(
        "integrated_gradients",
        values,
        tokens,
        end,
        baseline=baseline,
        baseline_metric=start,
        completeness_error=(sums - (end - start)).abs(),
    )


def _with_metric(subject: Any, prompts: Any, answers: Any, wrong: Any, at: int | str) -> tuple[list[Any], LogitMetric]:
    prompts = list(prompts)
    if not prompts:
        raise DataError("Token attribution was given no prompts.", remedy="Give at least one.")
    vocab = subject.facts.d_vocab
    right = token_ids(answers, len(prompts), what="answers", vocab=vocab)
    other = None if wrong is None else token_ids(wrong, len(prompts), what="wrong answers", vocab=vocab)
    return prompts, LogitMetric(right, other, at)


def _baseline(subject: Any, name: str, ids: Tensor, value: Float[Tensor, "position d_model"]) -> Tensor:
    """The embeddings at which the path starts, [position, d_model]."""
    if name == "zero":
        return torch.zeros_like(value)
    if name == "pad":
        token = _pad_token(subject)
        return subject.read([[token] * len(value)], "embed")["embed"][0].float().cpu()
    W_E = Weights(subject).W_E.detach().float().cpu()
    rows = W_E[ids]
    factor = float((rows * value).sum() / rows.square().sum().clamp(min=1e-30))  # a family may scale its embeddings
    if float((factor * rows - value).abs().max()) > 1e-3 * float(value.abs().max()):
        raise UnavailableSiteError(
            f"The embeddings of {subject.name} are not rows of one matrix, so they have no mean over the vocabulary.",
            remedy='Use baseline="zero" or "pad".',
        )
    return (factor * W_E.mean(0)).expand_as(value)


def _pad_token(subject: Any) -> int:
    sources = (subject.tokenizer, subject.config)
    for name in ("pad_token_id", "eos_token_id"):
        for source in sources:
            token = getattr(source, name, None)
            if isinstance(token, int):
                return token
    raise DataError("Neither the tokenizer nor the config names a padding token.", remedy='Use baseline="zero".')


def _padded(
    method: str, rows: list[Tensor], tokens: list[Tensor], metric: Float[Tensor, " batch"], **rest: Any
) -> TokenAttribution:
    """Rows of unequal length as one array, prompts starting in column 0."""
    width = max(len(row) for row in rows)
    values, ids = torch.zeros(len(rows), width), torch.full((len(rows), width), -1, dtype=torch.long)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        values[index, : len(row)] = row
        ids[index, : len(token)] = token
    return TokenAttribution(method, values, ids >= 0, ids, metric, **rest)
