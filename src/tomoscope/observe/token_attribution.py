"""Which input tokens an answer depends on, by gradients at the token embeddings.

`gradient`: the length of the gradient of the answer's logit (or logit difference) at each token's embedding. `gradient
x input`: its product with the embedding. `integrated gradients` (Sundararajan et al. 2017, arXiv:1703.01365): the
gradient averaged on the straight line from a baseline to the input, times their difference; its values sum to
metric(input) - metric(baseline), and how far they are from that (the completeness error) is reported for every prompt.

How it can mislead: a gradient is local: a saturated model has none where the token matters. Integrated gradients depend
on the baseline (a zero embedding is no token; compare several) and pass through inputs that no text gives. All three
hold the attention's other inputs in the path, so values are not shares of importance; negative is possible.

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
from tomoscope.model import add
from tomoscope.model.weights import Weights
from tomoscope.observe.samples import token_ids

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
class Answer:
    """The metric: logit(answer) at a position, minus logit(wrong) if there is one."""

    answer: int
    wrong: int | None
    at: int | str

    def __call__(self, logits: Float[Tensor, "row position vocab"], batch: Any) -> Float[Tensor, " row"]:
        """[row], in logits."""
        columns, _ = batch.columns(self.at)
        here = logits[torch.arange(len(logits), device=logits.device), columns[:, 0].to(logits.device)]
        own = here[:, self.answer]
        return own if self.wrong is None else own - here[:, self.wrong]


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
    rows, metrics, tokens = [], [], []
    for prompt, answer in _with_metrics(subject, prompts, answers, wrong, at):
        out = subject.gradients([prompt], answer, ["embed"])
        slope, value = out.gradients["embed"][0].float().cpu(), out.values["embed"][0].float().cpu()
        rows.append(slope.norm(dim=-1) if method == "gradient" else (slope * value).sum(-1))
        metrics.append(float(out.metric[0]))
        tokens.append(_ids(out.values))
    return _padded(method, rows, tokens, metrics)


def integrated_gradients(
    subject: Any,
    prompts: Sequence[Any],
    answers: Sequence[int] | Int[Tensor, " batch"],
    wrong: Sequence[int] | Int[Tensor, " batch"] | None = None,
    *,
    at: int | str = "last",
    baseline: str = "zero",
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
    values, metrics, starts, tokens = [], [], [], []
    for prompt, answer in _with_metrics(subject, prompts, answers, wrong, at):
        read = subject.read([prompt], "embed")
        value = read["embed"][0].float().cpu()
        gap = value - _baseline(subject, baseline, _ids(read), value)
        total = torch.zeros_like(value)
        for low in range(0, steps, rows):
            # moving by (alpha - 1) gap puts the embedding at baseline + alpha gap; adding leaves the gradient the same
            moves = (alphas[low : low + rows, None, None] - 1) * gap
            out = subject.gradients([prompt] * len(moves), answer, ["embed"], edits=[add("embed", moves)])
            total += torch.einsum("r,rpd->pd", shares[low : low + rows], out.gradients["embed"].float().cpu())
        ends = subject.run([prompt] * 2, edits=[add("embed", torch.stack([torch.zeros_like(gap), -gap]))])
        metric, start = answer(ends.logits, ends.batch).float().tolist()
        values.append((total * gap).sum(-1))
        metrics.append(metric)
        starts.append(start)
        tokens.append(_ids(read))
    errors = [abs(float(v.sum()) - (end - start)) for v, end, start in zip(values, metrics, starts, strict=True)]
    return _padded(
        "integrated_gradients",
        values,
        tokens,
        metrics,
        baseline=baseline,
        baseline_metric=torch.tensor(starts),
        completeness_error=torch.tensor(errors),
    )


def _with_metrics(subject: Any, prompts: Any, answers: Any, wrong: Any, at: int | str) -> list[tuple[Any, Answer]]:
    prompts = list(prompts)
    if not prompts:
        raise DataError("Token attribution was given no prompts.", remedy="Give at least one.")
    vocab = subject.facts.d_vocab
    right = token_ids(answers, len(prompts), what="answers", vocab=vocab).tolist()
    other = [None] * len(prompts)
    if wrong is not None:
        other = token_ids(wrong, len(prompts), what="wrong answers", vocab=vocab).tolist()
    return [(prompt, Answer(a, w, at)) for prompt, a, w in zip(prompts, right, other, strict=True)]


def _ids(activations: Any) -> Int[Tensor, " position"]:
    return activations.batch.input_ids[0].cpu()


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
    method: str, rows: list[Tensor], tokens: list[Tensor], metrics: list[float], **rest: Any
) -> TokenAttribution:
    """Rows of unequal length as one array, prompts starting in column 0."""
    width = max(len(row) for row in rows)
    values, ids = torch.zeros(len(rows), width), torch.full((len(rows), width), -1, dtype=torch.long)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        values[index, : len(row)] = row
        ids[index, : len(token)] = token
    return TokenAttribution(method, values, ids >= 0, ids, torch.tensor(metrics), **rest)
