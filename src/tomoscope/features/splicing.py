"""The model with a dictionary's reconstruction in place of the activation: what does it lose?

Cross-entropy of the next token under the clean model, with the reconstruction, and with the site set to zero and to its
mean; what is recovered is (ablated - spliced) / (ablated - clean), a ratio of sums over prompts. KL is from the clean
model's predictions to the spliced model's, at every token, and with the zero-ablated one beside it (SAEBench's KL score
is the share of that divergence which is gone).

How it can mislead: where ablation does no harm nothing can be recovered, which is then "not measured"; the mean was
taken on the same text (one vector from thousands of tokens).

Steps: read the input of the dictionary, reconstruct, write it, compare predictions token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.features.coder import SparseCoder
from tomoscope.features.samples import decoded
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import ratio_interval
from tomoscope.model import Subject, replace
from tomoscope.model.batch import Batch, Encoded, encode

NAMES = ("n", "clean", "spliced", "zero", "mean", "kl", "kl_zero")
ROWS = 16


def batches(subject: Subject, prompts: Sequence[Any], batch_size: int | None) -> Iterator[Batch]:
    """Prompts as padded batches, few enough that all logits of one fit."""
    waiting: list[Encoded] = []
    for row, prompt in enumerate(prompts):
        waiting.append(encode(prompt, subject.tokenizer, context=subject.facts.context, row=row))
        if len(waiting) >= (batch_size or ROWS):
            yield subject.tokens(waiting)
            waiting = []
    if waiting:
        yield subject.tokens(waiting)


@torch.no_grad()
def reconstructed(coder: SparseCoder, x: Float[Tensor, "batch position *width"]) -> Float[Tensor, "batch position _"]:
    """The reconstruction at every position of a padded batch."""
    flat = x.float().flatten(2)
    made = decoded(coder, coder.sparse(flat.flatten(0, 1)), flat.flatten(0, 1))
    return made.reshape(*flat.shape[:2], -1)


@torch.no_grad()
def downstream_measures(
    subject: Subject,
    coder: SparseCoder,
    prompts: Sequence[Any],
    mean: Float[Tensor, " d_out"],
    *,
    reads: str,
    writes: str,
    skip_first: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Cross-entropies, what is recovered of them, and divergences, each with its interval over prompts.

    Args:
        subject: the model.
        coder: the dictionary.
        prompts: texts or rows of token ids.
        mean: what the site holds on average.
        reads, writes: the dictionary's sites.
        skip_first: leave each prompt's first token as it is, in every run.
        batch_size: prompts at once.
        seed: of the intervals.
    """
    table: list[np.ndarray] = []
    for batch in batches(subject, prompts, batch_size):
        # the clean run gives the sites and the predictions to compare with
        clean = subject.run(batch, read=tuple(dict.fromkeys((reads, writes))))
        acts, own = clean.activations, clean.activations[writes]
        made = reconstructed(coder, acts[reads]).reshape(own.shape)
        ablated = {"zero": torch.zeros_like(own), "mean": mean.to(own).reshape(own.shape[2:]).expand_as(own).clone()}
        if skip_first:
            rows = torch.arange(len(batch))
            for value in (made, *ablated.values()):
                value[rows, batch.pads] = own[rows, batch.pads].to(value)
        table.append(_compared(subject, batch, clean.logits, writes, {"spliced": made, **ablated}))
    sums = dict(zip(NAMES, np.concatenate(table).T, strict=True))
    return _estimates(sums, seed)


def _compared(
    subject: Subject, batch: Batch, logits: Tensor, site: str, values: dict[str, Tensor]
) -> Float[np.ndarray, "prompt sum"]:
    """Sums over each prompt's predictions, in the order of NAMES."""
    assert batch.input_ids is not None
    mask = batch.mask.to(subject.device)
    known = (mask[:, :-1] & mask[:, 1:]).double()
    target = batch.input_ids[:, 1:, None].to(subject.device)
    clean = logits[:, :-1].float().log_softmax(-1)
    p = clean.exp()
    out = {"n": known.sum(-1), "clean": (-clean.gather(-1, target)[..., 0].double() * known).sum(-1)}
    for name, value in values.items():
        other = subject.run(batch, edits=[replace(site, value)]).logits[:, :-1].float().log_softmax(-1)
        out[name] = (-other.gather(-1, target)[..., 0].double() * known).sum(-1)
        if name in ("spliced", "zero"):
            divergence = (p * (clean - other)).sum(-1).double()
            out["kl" if name == "spliced" else "kl_zero"] = (divergence * known).sum(-1)
    return torch.stack([out[name] for name in NAMES], -1).cpu().numpy()


def _estimates(sums: dict[str, np.ndarray], seed: int) -> dict[str, Estimate]:
    n = sums["n"]
    if not n.sum():
        none = Estimate.unknown("no prompt has a token after another", unit="nats a token")
        return dict.fromkeys(("ce_clean", "ce_spliced", "ce_recovered_zero", "ce_recovered_mean", "kl"), none)

    def mean(name: str) -> Estimate:
        return ratio_interval(sums[name], n, seed=seed, unit="nats a token")

    out = {f"ce_{name}": mean(name) for name in ("clean", "spliced", "zero", "mean")}
    out["kl"], out["kl_zero"] = mean("kl"), mean("kl_zero")
    for name in ("zero", "mean"):
        harm = sums[name] - sums["clean"]
        spread = ratio_interval(harm, n, seed=seed, unit="nats a token")
        if (spread.low is not None and spread.low <= 0) or spread.value is None or spread.value <= 0:
            why = f"{name} ablation does not clearly raise the cross-entropy ({spread})"
            out[f"ce_recovered_{name}"] = Estimate.unknown(why, unit="share")
        else:
            out[f"ce_recovered_{name}"] = ratio_interval(sums[name] - sums["spliced"], harm, seed=seed, unit="share")
    gone = sums["kl_zero"] - sums["kl"]
    out["kl_recovered_zero"] = ratio_interval(gone, sums["kl_zero"], seed=seed, unit="share")
    return out
