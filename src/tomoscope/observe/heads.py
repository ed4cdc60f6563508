"""What attention heads do: previous-token, duplicate-token, induction and copying scores (name_movers.py has the rest).

On random tokens said twice (r1 .. rL r1 .. rL) a head's attention from the second copy tells its role: to the token
before (previous-token), to the same token's first occurrence (duplicate-token), to the token after that (induction;
Olsson et al. 2022, arXiv:2209.11895). Copying is read from the weights: the eigenvalues of W_E W_V W_O W_U (W_U
centred over the vocabulary), whose sum over the sum of their moduli is 1 for a head that raises the tokens it attends
to and -1 for one that lowers them (Elhage et al. 2021).

How it can mislead: random tokens are off the training distribution; a head may do something else on text. Attention is
not use: a head's role says what it looks at, not that the model needs it. Position alone can imitate a role, so every
score on tokens stands beside the same head's on random tokens that do not repeat. The eigenvalue score ignores norms
and MLPs before the head, and its value for an untrained head is not exactly 0: it stands beside the score with the
vocabulary shuffled.

Steps: draw sequences, read all layers' patterns in one pass, take the diagonal that belongs to the role; for copying,
take eigenvalues in the head's own space (head_dim x head_dim, where the nonzero ones are the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.model.weights import Weights

ROLES = ("previous_token", "duplicate_token", "induction")


@dataclass(frozen=True)
class HeadScores:
    """One role's score for every head.

    Attributes:
        role: "previous_token", "duplicate_token" or "induction".
        layers: the layers whose pattern can be read.
        values: [layer, head, sample], mean attention weight of the role's (query, key) pairs in one sequence, 0 to 1.
        control: [layer, head, sample], the same pairs of positions on random tokens that do not repeat; for
            previous_token, which is a matter of position alone, uniform attention.
        uniform: [layer], what attention spread evenly over the keys allowed in that layer would give.
        sequences: [sample, position], the token ids on which `values` was measured.
    """

    role: str
    layers: tuple[int, ...]
    values: Float[Tensor, "layer head sample"]
    control: Float[Tensor, "layer head sample"]
    uniform: Float[Tensor, " layer"]
    sequences: Int[Tensor, "sample position"]


@dataclass(frozen=True)
class CopyingScores:
    """How far each head's OV circuit raises the tokens that it attends to.

    Attributes:
        layers: the layers that have attention.
        values: [layer, head], sum of the eigenvalues over the sum of their moduli, -1 to 1.
        control: [layer, head, permutation], the same with the unembedding's tokens shuffled.
        eigenvalues: [layer, head, head_dim], the nonzero eigenvalues of W_E W_V W_O W_U (0 beyond a
            layer's head_dim).
    """

    layers: tuple[int, ...]
    values: Float[Tensor, "layer head"]
    control: Float[Tensor, "layer head permutation"]
    eigenvalues: Complex[Tensor, "layer head head_dim"]


def repeated_tokens(
    subject: Any, *, sequences: int, length: int, repeat: bool = True, start: int | None = None, seed: int = 0
) -> Int[Tensor, "sample position"]:
    """Random distinct ordinary tokens, said twice (or twice as many, none repeated), perhaps after a start token.

    Raises:
        DataError: the vocabulary or the context is too small for the length.
    """
    special = set(getattr(subject.tokenizer, "all_special_ids", None) or [])
    pool = torch.tensor([token for token in range(subject.facts.d_vocab) if token not in special])
    total = 2 * length + (start is not None)
    context = subject.facts.context
    if length < 2 or 2 * length > len(pool) or (context is not None and total > context):
        raise DataError(
            f"Sequences of 2 x {length} distinct random tokens don't fit a vocabulary of {len(pool)} and a context of "
            f"{context}.",
            remedy="Give a smaller length (at least 2).",
        )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([pool[torch.randperm(len(pool), generator=generator)[: 2 * length]] for _ in range(sequences)])
    rows = torch.cat([rows[:, :length], rows[:, :length]], dim=1) if repeat else rows
    return rows if start is None else torch.cat([torch.full((sequences, 1), start), rows], dim=1)


@torch.no_grad()
def attention_roles(
    subject: Any, *, sequences: int = 32, length: int | None = None, start: int | None = None, seed: int = 0
) -> dict[str, HeadScores]:
    """Previous-token, duplicate-token and induction scores of every head, each beside its control.

    Args:
        subject: an opened model with attention patterns.
        sequences: random sequences, the samples of the scores.
        length: tokens of one copy; default 24, or less where the context or the vocabulary is smaller.
        start: a token put before each sequence (a start-of-text token the model expects), or None.
        seed: of the tokens.

    Raises:
        UnavailableSiteError: no layer's pattern can be read.
        DataError: the length does not fit the vocabulary or the context.
    """
    if length is None:
        room = (subject.facts.context or 4096) - (start is not None)
        length = max(2, min(24, room // 2, subject.facts.d_vocab // 4))
    first = int(start is not None)
    queries = torch.arange(first + length, first + 2 * length)
    pairs = {
        "previous_token": (torch.arange(first + 1, first + 2 * length), torch.arange(first, first + 2 * length - 1)),
        "duplicate_token": (queries, queries - length),
        "induction": (queries[:-1], queries[:-1] - length + 1),
    }
    layers = readable_layers(subject, "attn.pattern")
    said_twice, fresh = (
        repeated_tokens(
            subject, sequences=sequences, length=length, repeat=repeat, start=start, seed=seed + (not repeat)
        )
        for repeat in (True, False)
    )
    twice, once = (_diagonals(subject, rows, layers, pairs) for rows in (said_twice, fresh))
    allowed = torch.stack([allowed_keys(subject, layer, said_twice.shape[1]) for layer in layers])
    out = {}
    for role, (query, _) in pairs.items():
        uniform = (1.0 / allowed[:, query]).mean(-1)
        positional = role == "previous_token"
        values = once[role] if positional else twice[role]
        control = uniform[:, None, None].expand_as(values) if positional else once[role]
        out[role] = HeadScores(role, layers, values, control, uniform, fresh if positional else said_twice)
    return out


def readable_layers(subject: Any, *parts: str) -> tuple[int, ...]:
    """The layers that can give all these parts.

    Raises:
        UnavailableSiteError: none can.
    """
    known = subject.sites()
    names = {layer: [f"layer.{layer}.{part}" for part in parts] for layer in range(subject.facts.n_layers)}
    layers = tuple(k for k, sites in names.items() if all(site in known and known[site].available for site in sites))
    if not layers:
        reasons = (known[site].reason for site in names.get(0, []) if site in known)
        missing = next((reason for reason in reasons if reason), "no attention")
        raise UnavailableSiteError(f"No layer of {subject.name} gives {' and '.join(parts)}: {missing}.")
    return layers


def allowed_keys(subject: Any, layer: int, length: int) -> Float[Tensor, " query"]:
    """How many keys each query may attend to in a layer: those before it, within the layer's window if it has one."""
    if subject.facts.kind != "decoder":
        return torch.full((length,), float(length))
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding" not in kinds[layer]:
        window = None
    if getattr(config, "attention_layers", None):  # GPT-Neo
        window = config.window_size if config.attention_layers[layer] == "local" else None
    count = torch.arange(1, length + 1, dtype=torch.float32)
    return count.clamp(max=window) if window else count


def _diagonals(
    subject: Any, rows: Tensor, layers: tuple[int, ...], pairs: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Float[Tensor, "layer head sample"]]:
    """Mean attention over each role's (query, key) pairs, per layer, head and sequence."""
    sites = [f"layer.{layer}.attn.pattern" for layer in layers]
    found: dict[str, list[Tensor]] = {role: [] for role in pairs}
    for activations in subject.stream(rows.tolist(), *sites):
        patterns = torch.stack([activations[site].float().cpu() for site in sites])
        for role, (query, key) in pairs.items():
            found[role].append(patterns[..., query, key].mean(-1).transpose(1, 2))
    return {role: torch.cat(pieces, dim=-1) for role, pieces in found.items()}


@torch.no_grad()
def copying_scores(subject: Any, *, permutations: int = 10, seed: int = 0) -> CopyingScores:
    """The eigenvalue copying score of every head, beside the same with the vocabulary shuffled.

    Raises:
        UnavailableSiteError: the model has no per-head value and output weights (see `Weights`).
    """
    weights = Weights(subject)
    layers = readable_layers(subject, "attn.z")
    vocab = min(weights.W_E.shape[0], weights.W_U.shape[1])  # a family may pad one of them, or embed more than it says
    W_E, W_U = weights.W_E[:vocab].double().cpu(), weights.W_U[:, :vocab].double().cpu()
    # what raises every token alike raises none, and is the same however the vocabulary is shuffled
    W_U = W_U - W_U.mean(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    shuffles = [torch.randperm(vocab, generator=generator) for _ in range(permutations)]
    # [1 + permutation, d_model, d_model]: from what a head writes, through the vocabulary, to what it reads
    through = torch.stack([W_U @ W_E, *(W_U[:, shuffle] @ W_E for shuffle in shuffles)])
    own, scores = [], []
    for layer in layers:
        # the nonzero eigenvalues of A B are those of B A, and W_O W_U W_E W_V is only head_dim wide
        W_V, W_O = weights.W_V[layer].double().cpu(), weights.W_O[layer].double().cpu()
        values = torch.linalg.eigvals(torch.einsum("hvd,pde,hew->hpvw", W_O, through, W_V))
        own.append(values[:, 0].to(torch.complex64).transpose(0, 1))
        scores.append((values.sum(-1).real / values.abs().sum(-1).clamp(min=1e-300)).float())
    score = torch.stack(scores)
    # layers may differ in head_dim; an eigenvalue of 0 more changes no score
    eigenvalues = torch.nn.utils.rnn.pad_sequence(own, batch_first=True).transpose(1, 2)
    return CopyingScores(layers, score[..., 0], score[..., 1:], eigenvalues)
