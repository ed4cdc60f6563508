"""What the edited place should hold: a vector for each fact, found by gradient descent, all facts of a batch at once.

For each fact a vector delta is added at the subject's last token (to the MLP's output for ROME, to the block's output
for MEMIT), in the prompt and in the prompt after each context; it minimises the new answer's negative log-likelihood,
plus a KL term that keeps "SUBJECT is a" where it was, plus a decay (norm over squared norm of the value, as the papers'
code has it), inside a ball. The facts do not touch each other, so their gradients, Adam steps and stops are those of
facts done one by one; only the end of the model from the edited place on is run again (`suffix.Suffix`).

How it can mislead: a low loss here says that the vector is found, not that any weight produces it.

Sources: Meng et al. 2022 (arXiv:2202.05262) and 2023 (arXiv:2210.07229).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import EditError
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded
from tomoscope.treat.edit.requests import EditRequest, encode_labelled, target_ids
from tomoscope.treat.edit.suffix import Suffix

_SPREAD = 1.4
"""A batch of facts holds ends of the model at most this many times as long as its shortest."""
PARTS = ("loss", "answer", "essence", "decay", "probability")


@dataclass(frozen=True)
class TargetSettings:
    """How a target is sought; the defaults are ROME's for GPT-2 XL, `SCALE_FREE` is for any model.

    Attributes:
        steps: losses that are computed at most (one update fewer, as in the papers' code).
        rate: of Adam; its steps are absolute, so in a stream of large norm the paper's 0.5 moves nothing.
        relative: the rate counts root mean squares of the value that stands there.
        decay: weight of |delta| / |value|^2.
        essence: weight of the KL term.
        clamp: |delta| at most this times |value|.
        stop: the loss below which a fact is done.
    """

    steps: int = 20
    rate: float = 0.5
    relative: bool = False
    decay: float = 0.5
    essence: float = 0.0625
    clamp: float = 4.0
    stop: float = 0.05


SCALE_FREE = TargetSettings(rate=0.2, relative=True)
"""Steps that follow the size of the value: about the paper's on GPT-2 XL, and steps of use in other models."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of some facts.

    Attributes:
        value: [fact, d_model] what stands at the place in the bare prompt.
        delta: [fact, d_model] what is to be added.
        losses: [fact, step, 5] loss and its parts (`PARTS`); NaN after a fact is done.
        modes: how the model was run ("cut": from the edited place on).
    """

    value: Float[Tensor, "fact d_model"]
    delta: Float[Tensor, "fact d_model"]
    losses: Float[Tensor, "fact step part"]
    modes: frozenset[str]

    @property
    def wanted(self) -> Float[Tensor, "fact d_model"]:
        """What should stand there."""
        return self.value + self.delta


@dataclass(frozen=True)
class _Rows:
    """One fact's rows: each context with the prompt and the answer but its last token, then the essence prompt."""

    rows: tuple[Encoded, ...]
    answer: tuple[int, ...]

    @property
    def suffix(self) -> int:
        """Tokens of a row from the edited one on."""
        return max(len(row.ids) - row.spans["edited"][1] + 1 for row in self.rows)

    @property
    def width(self) -> int:
        return max(len(row.ids) for row in self.rows)


def check_contexts(contexts: Sequence[str]) -> tuple[str, ...]:
    """Context templates, each with "{}" once, the first one bare. Raises EditError for others."""
    if not contexts or contexts[0] != "{}" or any(one.count("{}") != 1 for one in contexts):
        raise EditError(
            'Context templates hold "{}" once each, and the first is "{}" alone.', remedy='Give ["{}", "So. {}"].'
        )
    return tuple(contexts)


def find_targets(
    subject: Subject,
    requests: Sequence[EditRequest],
    layer: int,
    *,
    kind: str,
    at: str = "subject",
    contexts: Sequence[str] = ("{}",),
    settings: TargetSettings | None = None,
    batch: int | None = None,
    mode: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Seek the targets of all facts, in batches.

    Args:
        subject: a decoder with a fast tokenizer.
        requests: the facts.
        layer: where the vector is added.
        kind: "mlp" or "block", see `Suffix`.
        at: "subject" (its last token) or "last" (the prompt's).
        contexts: templates, the bare one first.
        settings: of the search.
        batch: facts at once; as many as the memory holds by default.
        mode: see `Suffix`.
        progress: called with (facts done, facts).
    """
    settings = settings or SCALE_FREE
    contexts = check_contexts(contexts)
    facts = [_encode(subject, one, contexts, at) for one in requests]
    # facts with as long an end, and as long a beginning, lie together: little is padded and little is run again
    order = sorted(range(len(facts)), key=lambda i: (facts[i].suffix, len(facts[i].answer), facts[i].width))
    value = torch.zeros(len(facts), subject.facts.d_model or 0, dtype=torch.promote_types(subject.dtype, torch.float32))
    delta, losses = torch.zeros_like(value), value.new_full((len(facts), settings.steps, len(PARTS)), torch.nan)
    modes: set[str] = set()
    done = 0
    while done < len(order):
        widest = max(facts[i].width for i in order[done:])
        fit = max(1, subject.rows_per_call(widest, gradients=True) // (len(contexts) + 1))
        mine = order[done : done + (batch or fit)]
        if batch is None:  # a longer end would have every row of the batch run from further back
            longest = _SPREAD * facts[mine[0]].suffix
            mine = [i for i in mine if facts[i].suffix <= longest]
        found = _search(subject, [facts[i] for i in mine], layer, kind, settings, mode)
        index = torch.tensor(mine)
        value[index], delta[index], losses[index] = (one.cpu() for one in found[:3])
        modes.add(found[3])
        done += len(mine)
        if progress is not None:
            progress(done, len(order))
    return Targets(value, delta, losses, frozenset(modes))


def _encode(subject: Subject, request: EditRequest, contexts: Sequence[str], at: str) -> _Rows:
    answer = target_ids(subject, request.labelled(), request.target_new)
    rows = []
    for context in contexts:
        one = encode_labelled(subject, request.labelled(context), at)
        rows.append(Encoded((*one.ids, *answer[:-1]), one.spans, one.text))
    return _Rows((*rows, encode_labelled(subject, request.essence(), at)), answer)


def _search(
    subject: Subject, facts: Sequence[_Rows], layer: int, kind: str, settings: TargetSettings, mode: str | None
) -> tuple[Tensor, Tensor, Tensor, str]:
    count, each = len(facts), len(facts[0].rows)
    batch = subject.tokens([row for fact in facts for row in fact.rows])
    columns = torch.tensor([row.spans["edited"][1] - 1 for row in batch.prompts]) + batch.pads
    longest = max(len(fact.answer) for fact in facts)
    essence = torch.arange(count) * each + each - 1
    tail = int((batch.width - columns[essence]).max())
    suffix = Suffix(subject, batch, layer, kind=kind, columns=columns, keep=max(longest, tail), mode=mode)
    device = subject.device
    value = suffix.value.reshape(count, each, -1)[:, 0].to(torch.promote_types(subject.dtype, torch.float32))
    answers, weight = _answers(facts, longest)
    answers, weight = answers.to(device), weight.to(device, value.dtype)
    # counted from the end of the row: where the essence prompt is edited
    place = (suffix.keep - (batch.width - columns[essence])).to(device)
    essence = essence.to(device)
    rate = settings.rate * (value.square().mean(-1, keepdim=True).sqrt() if settings.relative else 1.0)
    delta = torch.zeros_like(value)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    losses = value.new_full((count, settings.steps, len(PARTS)), torch.nan)
    active = torch.ones(count, dtype=torch.bool, device=device)
    usual = suffix.logits[essence, place].to(value.dtype).log_softmax(-1)
    for step in range(settings.steps):
        with torch.enable_grad():
            moved = delta.detach().clone().requires_grad_(True)
            logits = suffix.run(moved.repeat_interleave(each, dim=0)).to(value.dtype)
            parts = _losses(logits, moved, value, usual, answers, weight, essence, place, each, settings)
            grad = torch.autograd.grad(parts[:, 0].sum(), moved)[0]
        losses[active, step] = parts.detach()[active]
        active &= parts[:, 0].detach() >= settings.stop
        if not bool(active.any()) or step == settings.steps - 1:
            break
        first = torch.lerp(first, grad, 0.1)
        second = second * 0.999 + 0.001 * grad.square()
        size = second.sqrt() / (1 - 0.999 ** (step + 1)) ** 0.5 + 1e-8
        updated = delta - rate / (1 - 0.9 ** (step + 1)) * first / size
        limit = settings.clamp * value.norm(dim=-1, keepdim=True)
        norm = updated.norm(dim=-1, keepdim=True)
        updated = torch.where(norm > limit, updated * limit / norm, updated)
        delta = torch.where(active[:, None], updated, delta)
    return value, delta, losses, suffix.mode


def _answers(facts: Sequence[_Rows], longest: int) -> tuple[Int[Tensor, "fact token"], Float[Tensor, "fact token"]]:
    """Answers aligned at the right, and the weight of each token in its fact's mean."""
    answers = torch.zeros(len(facts), longest, dtype=torch.long)
    weight = torch.zeros(len(facts), longest)
    for place, fact in enumerate(facts):
        answers[place, longest - len(fact.answer) :] = torch.tensor(fact.answer)
        weight[place, longest - len(fact.answer) :] = 1
    return answers, weight


def _losses(
    logits: Tensor, delta: Tensor, value: Tensor, usual: Tensor, answers: Tensor, weight: Tensor, essence: Tensor,
    place: Tensor, each: int, settings: TargetSettings,
) -> Float[Tensor, "fact part"]:  # fmt: skip
    count, longest = answers.shape
    said = logits[:, -longest:].reshape(count, each, longest, -1)[:, : each - 1].log_softmax(-1)
    picked = said.gather(-1, answers[:, None, :, None].expand(count, each - 1, longest, 1))[..., 0]
    rows = -(picked * weight[:, None]).sum(-1) / weight.sum(-1)[:, None]
    now = logits[essence, place].log_softmax(-1)
    kept = settings.essence * (now.exp() * (now - usual)).sum(-1)
    decay = settings.decay * delta.norm(dim=-1) / value.norm(dim=-1).square()
    answer = rows.mean(-1)
    return torch.stack([answer + kept + decay, answer, kept, decay, (-rows).exp().mean(-1)], dim=-1)
