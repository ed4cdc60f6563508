"""Why a head attends: an attention score as a sum over pairs of nodes, one at the query and one at the key.

    found = qk_attribution(replacement, layer=5, head=3, query=11, key=4)
    found.pairs(10)          the pairs of nodes that make the score most, with what each adds
    found.by_query, found.by_key    each node's part, summed over the other side

A score before the softmax is query . key x a factor, and query and key are linear in the stream once the norms' scales
are frozen. So both are sums over the prompt's features, errors, tokens and a constant, each carried to its place by the
frozen model as in an attribution graph, and the score is their bilinear form: it sums exactly, which is checked. Only
2 x head_dim rows are swept, whatever the number of nodes.

How it can mislead: a softmax does not see what all keys share; `against` another key asks why this one rather than that
one, which is mostly the better question. Nodes at earlier positions come in through lower heads, whose own attention is
taken as given. A soft-cap (Gemma 2) comes after the sum. Source: Kamath et al. 2025, "Tracing Attention Computation
Through Feature Interactions".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.attribution.build import dense_rows
from tomoscope.circuits.attribution.heads_read import head_reads
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.skeleton import tolerance
from tomoscope.circuits.attribution.sweep import Rows, Sweep
from tomoscope.errors import ModelError, SiteError, UnavailableSiteError
from tomoscope.model.families import ATTENTION_SOFTCAP_NAMES


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """An attention score, or the difference of two, as a sum over pairs of nodes; see the module's docstring.

    Attributes:
        layer, head, query, key: which score.
        against: another key whose score is taken away, or None.
        names: of the nodes: active features, errors, tokens, and last "constant".
        query_parts: [node, head_dim], what each adds to the query.
        key_parts: [node, head_dim], what each adds to the key, times the factor.
        score: the model's own, before a soft-cap and without what is not query . key.
        offset: what the model adds to it (ALiBi's penalty of distance, a shift of the whole row).
        cap: the soft-cap on scores, or None.
    """

    layer: int
    head: int
    query: int
    key: int
    against: int | None
    names: tuple[str, ...]
    query_parts: Float[Tensor, "node head_dim"]
    key_parts: Float[Tensor, "node head_dim"]
    score: float
    offset: float
    cap: float | None

    @property
    def by_query(self) -> Float[Tensor, " node"]:
        """Each node's part by what it adds to the query; sums to the score."""
        return self.query_parts @ self.key_parts.sum(0)

    @property
    def by_key(self) -> Float[Tensor, " node"]:
        """Each node's part by what it adds to the key; sums to the score."""
        return self.key_parts @ self.query_parts.sum(0)

    def matrix(self, queries: Iterable[int], keys: Iterable[int]) -> Float[Tensor, "query_node key_node"]:
        """The parts of pairs of some nodes."""
        return self.query_parts[list(queries)] @ self.key_parts[list(keys)].T

    def pairs(self, n: int = 10) -> list[tuple[str, str, float]]:
        """The n pairs (node at the query, node at the key, part) that make the score most, whatever their sign."""
        best: list[tuple[float, int, int]] = []
        for start in range(0, len(self.query_parts), 512):
            block = self.query_parts[start : start + 512] @ self.key_parts.T
            flat = block.flatten().abs().topk(min(n, block.numel())).indices.tolist()
            best += [(float(block.flatten()[i]), start + i // block.shape[1], i % block.shape[1]) for i in flat]
        best.sort(key=lambda one: -abs(one[0]))
        return [(self.names[q], self.names[k], part) for part, q, k in best[:n]]

    @property
    def gap(self) -> float:
        """By how much the parts fail to sum to the score, relative to query and key's lengths."""
        query, key = self.query_parts.sum(0), self.key_parts.sum(0)
        return abs(float(query @ key) - self.score) / max(float(query.norm() * key.norm()), abs(self.score), 1e-30)


@torch.no_grad()
def qk_attribution(
    replacement: LocalReplacement,
    *,
    layer: int,
    head: int,
    query: int,
    key: int,
    against: int | None = None,
    sweep: Sweep | None = None,
) -> QKAttribution:
    """Decompose one attention score.

    Args:
        replacement: the prompt's local replacement model.
        layer: block.
        head: query head.
        query: position that attends.
        key: position that is attended to; not after the query.
        against: another position: the difference of the two scores is decomposed.
        sweep: of this replacement model, to use again.

    Raises:
        SiteError: no such head or position.
        UnavailableSiteError: scores are made in a way that is not known here.
        ModelError: the parts do not sum to the score.
    """
    _check(replacement, layer, head, query, [key] if against is None else [key, against])
    keys = [key] if against is None else [key, against]
    factor, offset, cap = _score_map(replacement, layer, head, query, keys)
    asked = head_reads(replacement, layer, head, "q", [query])[0]
    told = head_reads(replacement, layer, head, "k", keys)
    reads, places = [asked, *told], [query, *keys]
    width = len(asked.value)
    directions = torch.cat([one.directions for one in reads])
    position = torch.tensor(places, device=directions.device).repeat_interleave(width)
    rows = Rows(torch.full_like(position, 2 * layer), position, lambda some: directions[some])
    swept = dense_rows(sweep or Sweep(replacement), rows)
    parts = []
    for number, (read, place) in enumerate(zip(reads, places, strict=True)):
        mine = slice(number * width, (number + 1) * width)
        constant = read.constant + read.directions @ replacement.constants[layer][place]
        parts.append(torch.cat([swept[mine].T, constant[None]]))
    key_parts = factor * (parts[1] if against is None else parts[1] - parts[2])
    value = told[0].value if against is None else told[0].value - told[1].value
    score = factor * float(asked.value @ value)
    found = QKAttribution(
        layer, head, query, key, against, node_names(replacement), parts[0].cpu(), key_parts.cpu(), score,
        offset[0] if against is None else offset[0] - offset[1], cap,
    )  # fmt: skip
    if found.gap > 10 * tolerance(replacement.subject.dtype):
        raise ModelError(f"The parts of a score sum to something else (relative gap {found.gap:.2g}).")
    return found


def node_names(replacement: LocalReplacement) -> tuple[str, ...]:
    """Names of a replacement model's sources, and of the constant."""
    tokenizer = replacement.subject.tokenizer
    texts = [tokenizer.decode([i]) if tokenizer is not None else str(i) for i in replacement.ids]
    triples = zip(replacement.layer.tolist(), replacement.position.tolist(), replacement.feature.tolist(), strict=True)
    positions = range(replacement.n_positions)
    return (
        *(f"L{a} p{b} f{c}" for a, b, c in triples),
        *(f"L{layer} p{place} error" for layer in range(replacement.n_layers) for place in positions),
        *(f"token {text!r} p{place}" for place, text in enumerate(texts)),
        "constant",
    )


def _check(replacement: LocalReplacement, layer: int, head: int, query: int, keys: list[int]) -> None:
    if not 0 <= layer < replacement.n_layers or not 0 <= head < replacement.subject.facts.n_heads:
        raise SiteError(f"There is no head {head} in layer {layer}.")
    if not all(0 <= key <= query for key in keys) or query >= replacement.n_positions:
        raise SiteError(
            f"A query at position {query} does not attend to {keys}; the prompt has {replacement.n_positions} tokens.",
            remedy="A key is not after its query, and not in another sliding window.",
        )


def _score_map(
    replacement: LocalReplacement, layer: int, head: int, query: int, keys: list[int]
) -> tuple[float, list[float], float | None]:
    """Factor, offsets and soft-cap: score = cap(factor x query . key) + offset; solved from the head's own scores."""
    subject, like = replacement.subject, replacement.tokens
    names = [f"layer.{layer}.attn.{part}" for part in ("q", "k", "scores")]
    acts = subject.read(replacement.batch, *names, keep_device=True)
    q, k = acts[names[0]][0, :, head].to(like), acts[names[1]][0].to(like)
    k = k[:, head * k.shape[1] // subject.facts.n_heads]
    scores, dots = acts[names[2]][0, head].to(like), q @ k.T
    masked = max(torch.finfo(subject.dtype).min / 4, -1e30)  # a mask may be the lowest number of another type
    seen = torch.ones_like(scores, dtype=torch.bool).tril() & (scores > masked)
    if not bool(seen[query, keys].all()):
        raise SiteError(f"The query at position {query} does not see all of the keys {keys} in layer {layer}.")
    text = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    caps = [float(value) for name in ATTENTION_SOFTCAP_NAMES if (value := getattr(text, name, None))]
    places = torch.arange(len(scores), dtype=like.dtype, device=like.device).expand_as(scores)
    for cap in (*caps, None):
        plain = scores if cap is None else cap * torch.atanh((scores / cap).clamp(-1 + 1e-9, 1 - 1e-9))
        # ALiBi adds a slope times the key's position; some families take the row's largest score from all of its
        # scores, which a softmax does not see: so each row counts from its own mean
        columns = torch.stack([_from_mean(one, seen) for one in (dots, places)], dim=1).double().cpu()
        wanted = _from_mean(plain, seen).double().cpu()
        solved = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        factor = float(solved[0])
        rest = plain - factor * dots
        size = max(float(plain[seen].abs().max()), 1e-30)
        if float((columns @ solved - wanted).abs().max()) / size < tolerance(subject.dtype) * 5:
            return factor, [float(rest[query, key]) for key in keys], cap
    raise UnavailableSiteError(
        f"The scores of layer.{layer} head {head} are not a factor times query . key, with or without ALiBi and a cap."
    )


def _from_mean(values: Float[Tensor, "query key"], seen: Tensor) -> Float[Tensor, " some"]:
    """The values that are seen, each less the mean of its row's."""
    kept = values.where(seen, 0.0)
    return (kept - kept.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1))[seen]
