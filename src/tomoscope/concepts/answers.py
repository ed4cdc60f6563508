"""What the model answers: log-probabilities of completions, zero-shot and calibrated, with or without edits.

    scores = completion_log_probs(subject, prompts, [(" yes", " no")] * len(prompts))        # [item, choice]

Each completion's tokens are encoded as they continue the prompt, and their log-probabilities are summed. How it can
mislead: a long completion has a low probability whatever it says; and a model may like the word "no" better than "yes"
everywhere, which `calibrated` takes out for balanced sets (the threshold is the median of a *training* part's
log-odds; Burns et al. 2022), and which buys several points of accuracy by itself. `contextual` measures the liking on
inputs that say nothing (Zhao et al. 2021, arXiv:2102.09690), which needs no balance and no items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.data.pairs import continuation
from tomoscope.data.prompts import as_prompt
from tomoscope.errors import PromptError
from tomoscope.model import Edit, Encoded, Subject


def completion_log_probs(
    subject: Subject,
    prompts: Sequence[Any],
    completions: Sequence[Sequence[str]],
    *,
    edits: Sequence[Edit] = (),
    batch_size: int = 64,
) -> Float[Tensor, "item choice"]:
    """Summed log-probability of each completion after its prompt.

    Args:
        subject: a decoder with a tokenizer.
        prompts: texts or prompts with spans.
        completions: the same number for each prompt.
        edits: written at the prompt's positions and, without `at`, at the completion's too; named positions are those
            of the prompt. Edits with `rows` count prompts.
        batch_size: prompts a call.

    Raises:
        PromptError: no prompts, or unequal numbers of completions.
        AlignmentError: a completion that the tokenizer merges with its prompt.
    """
    if not prompts or len({len(some) for some in completions}) != 1 or len(completions) != len(prompts):
        raise PromptError(f"{len(completions)} lists of completions for {len(prompts)} prompts.", remedy="One each.")
    plain = [as_prompt(prompt) for prompt in prompts]
    encoded = list(subject.tokens(plain).prompts)
    tails = [
        [continuation(subject.tokenizer, prompt, one) for one in some]
        for prompt, some in zip(plain, completions, strict=True)
    ]
    choices = len(completions[0])
    if all(len(tail) == 1 for some in tails for tail in some):
        found = []
        for start in range(0, len(encoded), batch_size):
            piece = encoded[start : start + batch_size]
            logits = subject.last_logits(piece, edits=_rows(edits, start, len(piece))).float().cpu().log_softmax(-1)
            ids = torch.tensor([[tail[0] for tail in some] for some in tails[start : start + batch_size]])
            found.append(logits.gather(1, ids))
        return torch.cat(found)
    rows = []
    for start in range(0, len(encoded), batch_size):
        piece = range(start, min(start + batch_size, len(encoded)))
        by_choice = []
        for choice in range(choices):
            whole = [_with_last(encoded[i], tails[i][choice]) for i in piece]
            changed = [_named(edit) for edit in _rows(edits, start, len(piece))]
            run = subject.run(whole, edits=changed)
            said = run.logits.float().cpu().log_softmax(-1)
            sums = []
            for row, i in enumerate(piece):
                tail = torch.tensor(tails[i][choice])
                end = int(run.batch.pads[row]) + len(whole[row].ids)
                sums.append(said[row, end - len(tail) - 1 : end - 1].gather(1, tail[:, None]).sum())
            by_choice.append(torch.stack(sums))
        rows.append(torch.stack(by_choice, dim=1))
    return torch.cat(rows)


_LAST = "tomoscope_prompt_end"


def _with_last(prompt: Encoded, tail: Sequence[int]) -> Encoded:
    """The prompt and its completion, with the prompt's last token as a span: "last" would be the completion's."""
    end = len(prompt.ids)
    return Encoded((*prompt.ids, *tail), {**prompt.spans, _LAST: (end - 1, end)}, prompt.text)


def _named(edit: Edit) -> Edit:
    if edit.at == "last":
        return dataclasses.replace(edit, at=_LAST)
    if isinstance(edit.at, int) and edit.at < 0:
        raise PromptError(
            "An edit counted from the end has no place in a prompt with completions of several tokens.",
            remedy='Say at="last", a span, or a position from the start.',
        )
    return edit


def _rows(edits: Sequence[Edit], start: int, count: int) -> list[Edit]:
    """Edits for some consecutive prompts."""
    kept = []
    for edit in edits:
        if edit.rows is None:
            kept.append(edit)
            continue
        mine = tuple(row - start for row in edit.rows if start <= row < start + count)
        if mine:
            kept.append(dataclasses.replace(edit, rows=mine))
    return kept


def log_odds(scores: Float[Tensor, "item choice"]) -> Float[Tensor, " item"]:
    """First choice against the second."""
    return scores[:, 0] - scores[:, 1]


def calibrated(odds: Float[Tensor, " item"], train: Bool[Tensor, " item"]) -> Float[Tensor, " item"]:
    """Log-odds less the median of the training items', so that half of those are answered yes."""
    return odds - odds[train].median()


def contextual(odds: Float[Tensor, " item"], content_free: Float[Tensor, " input"]) -> Float[Tensor, " item"]:
    """Log-odds less those of content-free inputs, whose probabilities are averaged (Zhao et al. 2021)."""
    mean = content_free.double().sigmoid().mean().clamp(1e-12, 1 - 1e-12)
    return odds - mean.logit().to(odds)
