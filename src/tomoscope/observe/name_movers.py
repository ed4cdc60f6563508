"""Name-mover heads: which heads read the answer's name at the end of a prompt and say it.

On prompts whose answer was said before ("When Mary and John went to the store, John gave a drink to" -> Mary), a
name-mover attends from the last token to the answer's and its OV circuit raises that token. Wang et al. 2022,
arXiv:2211.00593, sections 3.1 and D.

How it can mislead: attending to a name and copying what is attended to are shown apart from being used; negative
name-movers attend to it too and lower it (`copying` is then 0). Copying is measured with the values the head really had
at the answer's position, not with the token's embedding, so what earlier layers put there counts.

Steps: read patterns and values in one pass; attention from the end to the answer's positions; each head's output at
full attention on the answer's first position, decoded by the model's own end, and the answer's rank in it; the same for
another prompt's answer as the control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.model.weights import Layered, Weights
from tomoscope.observe.heads import readable_layers
from tomoscope.observe.lens import CHUNK_BYTES, row_chunks
from tomoscope.observe.samples import token_ids


@dataclass(frozen=True)
class NameMoverScores:
    """Attention to the answer's name from the end of each prompt, and whether what is read there says that name.

    Attributes:
        layers: the layers that could be read.
        attention: [layer, head, sample], from the last token to the answer's, summed over its occurrences.
        attention_wrong: [layer, head, sample], the same to the wrong answer's.
        uniform: [sample], what even attention over the prompt would give the answer.
        copying: [layer, head, sample], 1 where the head's output at full attention on the answer's (first) position
            puts the answer among the `top` tokens, else 0.
        copying_control: [layer, head, sample], the same for another prompt's answer.
        answers: [sample], token ids.
    """

    layers: tuple[int, ...]
    attention: Float[Tensor, "layer head sample"]
    attention_wrong: Float[Tensor, "layer head sample"]
    uniform: Float[Tensor, " sample"]
    copying: Float[Tensor, "layer head sample"]
    copying_control: Float[Tensor, "layer head sample"]
    answers: Int[Tensor, " sample"]

    @property
    def values(self) -> Float[Tensor, "layer head sample"]:
        """Attention x copying: the part of the attention that moves the name."""
        return self.attention * self.copying

    @property
    def control(self) -> Float[Tensor, "layer head sample"]:
        """Even attention x copying of another prompt's name."""
        return self.uniform * self.copying_control


@torch.no_grad()
def name_movers(subject: Any, pairs: Any, *, top: int = 5, seed: int = 0) -> NameMoverScores:
    """Name-mover scores on clean prompts whose answer is a token said before, such as the IOI task's.

    Args:
        subject: an opened decoder.
        pairs: a set of pairs with `.encode(tokenizer)`, or what that returns: anything with `.clean_ids` (token ids per
            prompt), `.answer_ids` and `.wrong_ids` ([pair, k]; the first of each is used).
        top: how high the answer must stand for the head to count as copying.
        seed: of the other prompts' answers that the control uses.

    Raises:
        DataError: an answer that does not occur in its prompt.
        UnavailableSiteError: no layer's pattern and values can be read.
    """
    aligned = pairs.encode(subject.tokenizer) if hasattr(pairs, "encode") else pairs
    prompts = [list(ids) for ids in aligned.clean_ids]
    answers, wrong = (
        token_ids(torch.as_tensor(ids)[:, 0], len(prompts), what=what, vocab=subject.facts.d_vocab)
        for ids, what in ((aligned.answer_ids, "answers"), (aligned.wrong_ids, "wrong answers"))
    )
    others = _other_answers(answers, seed)
    layers = readable_layers(subject, "attn.pattern", "attn.v")
    W_O = Weights(subject).W_O
    sites = [f"layer.{layer}.attn.{part}" for layer in layers for part in ("pattern", "v")]
    pieces: list[dict[str, Tensor]] = []
    seen = 0
    for activations in subject.stream(prompts, *sites):
        rows = slice(seen, seen + len(activations.batch))
        seen = rows.stop
        tokens = torch.stack([answers[rows], wrong[rows], others[rows]])
        pieces.append(_one_batch(subject, activations, layers, W_O, tokens, top=top, first=rows.start))
    whole = {name: torch.cat([piece[name] for piece in pieces], dim=-1) for name in pieces[0]}
    return NameMoverScores(layers=layers, answers=answers, **whole)


def _one_batch(
    subject: Any,
    activations: Any,
    layers: tuple[int, ...],
    W_O: Layered,
    tokens: Int[Tensor, "3 sample"],
    *,
    top: int,
    first: int,
) -> dict[str, Tensor]:
    """The scores of one batch; `tokens` are its answers, wrong answers and other prompts' answers."""
    batch = activations.batch
    answers, wrong, others = tokens
    ids, mask, last = batch.input_ids.cpu(), batch.mask.cpu(), batch.last.cpu()
    said, unsaid = ((ids == token[:, None]) & mask for token in (answers, wrong))
    if not bool(said.any(1).all()):
        row = int((~said.any(1)).nonzero()[0, 0])
        raise DataError(
            f"The answer of prompt {first + row} (token {int(answers[row])}) does not occur in it.",
            remedy="Name movers are for tasks whose answer was said before, such as IOI.",
        )
    here = torch.arange(len(batch))
    patterns = torch.stack([activations[f"layer.{layer}.attn.pattern"].float().cpu() for layer in layers])
    ends = patterns[:, here, :, last]  # advanced indexing puts the batch first: [batch, layer, head, key]
    where = said.int().argmax(1)
    ranks = torch.stack(
        [
            _ranks(
                subject,
                activations[f"layer.{layer}.attn.v"][here, where],
                W_O[layer],
                torch.stack([answers, others], -1),
            )
            for layer in layers
        ]
    )  # [layer, head, sample, 2]
    return {
        "attention": torch.einsum("blhk,bk->lhb", ends, said.float()),
        "attention_wrong": torch.einsum("blhk,bk->lhb", ends, unsaid.float()),
        "uniform": said.sum(1) / mask.sum(1),
        "copying": (ranks[..., 0] < top).float(),
        "copying_control": (ranks[..., 1] < top).float(),
    }


def _other_answers(answers: Int[Tensor, " sample"], seed: int) -> Int[Tensor, " sample"]:
    """For each prompt the answer of another prompt whose answer differs.

    Raises:
        DataError: every prompt has the same answer.
    """
    if len(answers) < 2 or bool((answers == answers[0]).all()):
        raise DataError("All prompts have the same answer, so copying has no control.", remedy="Use several names.")
    generator = torch.Generator().manual_seed(seed)
    out = []
    for answer in answers.tolist():
        rest = answers[answers != answer]
        out.append(int(rest[torch.randint(len(rest), (1,), generator=generator)]))
    return torch.tensor(out)


def _ranks(
    subject: Any, value: Float[Tensor, "sample kv_head head_dim"], W_O: Tensor, tokens: Int[Tensor, "sample 2"]
) -> Int[Tensor, "head sample 2"]:
    """How many tokens stand above each of two, when each head's output at full attention on a position is decoded."""
    groups = W_O.shape[0] // value.shape[1]
    spread = value.to(W_O.device).repeat_interleave(groups, dim=1)
    written = torch.einsum("shv,hvd->hsd", spread.to(W_O.dtype), W_O)
    flat, wanted = written.flatten(0, 1), tokens.repeat(W_O.shape[0], 1)
    ranks = []
    for rows in row_chunks(len(flat), 2 * subject.facts.d_vocab, CHUNK_BYTES):
        logits = subject.unembed(flat[rows]).float().cpu()
        own = logits.gather(-1, wanted[rows])
        ranks.append((logits[:, None] > own[..., None]).sum(-1))
    return torch.cat(ranks).reshape(W_O.shape[0], len(tokens), 2)
