"""The rows of an attribution graph: which readings of the stream are explained, and what each should sum to.

A feature's row is its encoder, read through the frozen norm; it sums to the feature's pre-activation. A logit's row is
its unembedding column less the mean of all columns, read through the frozen final norm: it sums to the logit less the
mean logit, before a soft-cap. Logits: the fewest that together reach a probability (0.95), at most 10, or those named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.circuits.attribution.skeleton import tolerance
from tomoscope.circuits.attribution.sweep import Rows
from tomoscope.errors import PromptError, UnavailableSiteError
from tomoscope.model import Weights
from tomoscope.model.families import SOFTCAP_NAMES

PROBABILITY, MOST = 0.95, 10
VOCAB_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class LogitTargets:
    """The logits that a graph explains.

    Attributes:
        ids: token of each, or the vocabulary's size and up for directions that are no token.
        names: text of each.
        probabilities: [logit]; weights of directions that are no token.
        directions: [logit, d_model], in what the unembedding reads.
        values: [logit], what each row should sum to.
        constants: [logit], of that, what comes from no stream (the unembedding's bias).
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: Float[Tensor, " logit"]
    directions: Float[Tensor, "logit d_model"]
    values: Float[Tensor, " logit"]
    constants: Float[Tensor, " logit"]

    def __len__(self) -> int:
        return len(self.ids)


def salient(logits: Float[Tensor, " vocab"], *, probability: float = PROBABILITY, most: int = MOST) -> list[int]:
    """The fewest tokens whose probabilities together reach `probability`, at most `most` of them."""
    top, ids = logits.double().softmax(-1).topk(min(most, len(logits)))
    enough = int(torch.searchsorted(top.cumsum(0), torch.tensor(probability, dtype=top.dtype, device=top.device)))
    return ids[: enough + 1].tolist()


def logit_targets(
    replacement: LocalReplacement,
    tokens: Sequence[int | str] | None = None,
    *,
    probability: float = PROBABILITY,
    most: int = MOST,
) -> LogitTargets:
    """The logits to explain.

    Args:
        replacement: the local replacement model.
        tokens: ids or texts of one token each; None for the salient ones.
        probability: what the salient ones reach together.
        most: how many at most.

    Raises:
        PromptError: a text that is not one token, or an id that is none.
        UnavailableSiteError: the logits are not what the final norm gives times the unembedding.
    """
    subject, logits = replacement.subject, replacement.logits
    ids = salient(logits, probability=probability, most=most) if tokens is None else _ids(replacement, tokens)
    head = find_head(replacement)
    W_U = Weights(subject).W_U
    chosen = torch.tensor(ids, device=W_U.device)
    columns = W_U[:, chosen].T.to(replacement.tokens)
    directions = head.factor * (columns - W_U.mean(1, dtype=replacement.tokens.dtype).to(columns))
    names = [subject.tokenizer.decode([i]) if subject.tokenizer is not None else str(i) for i in ids]
    return LogitTargets(
        tuple(ids), tuple(names), logits.softmax(-1)[chosen.to(logits.device)], directions,
        head.exact[chosen] - head.exact.mean(), head.factor * (head.bias[chosen] - head.bias.mean()),
    )  # fmt: skip


def direction_targets(
    replacement: LocalReplacement,
    directions: Float[Tensor, "logit d_model"],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
) -> LogitTargets:
    """Explain any directions in what the unembedding reads, for example a difference of two logits' columns.

    Args:
        replacement: the local replacement model.
        directions: [logit, d_model].
        names: of each.
        weights: that stand for probabilities; equal by default.
    """
    like = replacement.tokens
    directions = directions.to(like)
    shares = torch.full((len(directions),), 1 / len(directions)) if weights is None else torch.tensor(list(weights))
    vocab = len(replacement.logits)
    return LogitTargets(
        tuple(vocab + i for i in range(len(directions))), tuple(names), shares.to(like), directions,
        directions @ replacement.ending, torch.zeros(len(directions), dtype=like.dtype, device=like.device),
    )  # fmt: skip


def _ids(replacement: LocalReplacement, tokens: Sequence[int | str]) -> list[int]:
    tokenizer, out = replacement.subject.tokenizer, []
    for token in tokens:
        if isinstance(token, str):
            ids = tokenizer(token, add_special_tokens=False)["input_ids"] if tokenizer is not None else []
            if len(ids) != 1:
                raise PromptError(
                    f"{token!r} is {len(ids)} tokens; a logit to be explained is one.",
                    remedy="Write it with its leading space, or give a token id.",
                )
            out.append(int(ids[0]))
        else:
            out.append(int(token))
    wrong = [i for i in out if not 0 <= i < len(replacement.logits)]
    if wrong or not out:
        raise PromptError(f"The logits to explain hold the id {wrong[0]}." if wrong else "No logit is to be explained.")
    return out


@dataclass(frozen=True, eq=False)
class Head:
    """What comes after the final norm: logits = cap(factor x (. @ W_U + bias)).

    Attributes:
        factor: the logit scale.
        bias: [vocab].
        cap: the soft-cap, or None.
        exact: [vocab], the prompt's last logits before the cap.
    """

    factor: float
    bias: Float[Tensor, " vocab"]
    cap: float | None
    exact: Float[Tensor, " vocab"]

    def uncapped(self, logits: Float[Tensor, "*set vocab"]) -> Float[Tensor, "*set vocab"]:
        """Logits before the soft-cap."""
        return logits if self.cap is None else self.cap * torch.atanh((logits / self.cap).clamp(-1 + 1e-9, 1 - 1e-9))


def find_head(replacement: LocalReplacement) -> Head:
    """The end of the model, checked against its own logits.

    Raises:
        UnavailableSiteError: the logits are not what the final norm gives times the unembedding.
    """
    subject, like = replacement.subject, replacement.tokens
    W_U = Weights(subject).W_U
    plain = torch.cat([replacement.ending.to(W_U.device) @ part.to(like.dtype) for part in W_U.split(VOCAB_CHUNK, 1)])
    own = getattr(subject.model.get_output_embeddings(), "bias", None)  # ty: ignore[not-callable]
    bias = torch.zeros_like(plain) if own is None else own.detach().to(plain)
    text = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    caps = [float(value) for name in SOFTCAP_NAMES if (value := getattr(text, name, None))]
    logits = replacement.logits.to(plain)
    for cap in (None, *caps):
        exact = Head(1.0, bias, cap, logits).uncapped(logits)
        with_bias = plain + bias
        factor = float((with_bias * exact).sum() / with_bias.square().sum().clamp(min=1e-300))
        factor = 1.0 if abs(factor - 1) < 1e-6 else factor
        gap = float((factor * with_bias - exact).abs().max()) / max(float(exact.abs().max()), 1e-30)
        if gap <= tolerance(subject.dtype):
            # the rows are to sum to what the norm gives times the unembedding; a cap's inverse would only add rounding
            return Head(factor, bias, cap, factor * with_bias)
    raise UnavailableSiteError(
        f"The logits of {subject.name} are not its final norm times its unembedding (relative gap {gap:.2g}).",
        remedy="A head with hidden layers of its own has no direct path to attribute to.",
    )


# ---- rows of the sweep


def feature_rows(replacement: LocalReplacement, which: Int[Tensor, " row"]) -> Rows:
    """The rows of some active features: their encoders through the frozen norm.

    Args:
        replacement: the local replacement model.
        which: numbers of active features.
    """
    late = torch.tensor([not block.skeleton.parallel for block in replacement.blocks], device=which.device)
    layer, position = replacement.layer[which], replacement.position[which]

    def directions(some: Tensor) -> Tensor:
        chosen = which[some]
        out = replacement.tokens.new_empty(len(chosen), replacement.tokens.shape[1])
        for one in layer[some].unique().tolist():
            mine = torch.nonzero(layer[some] == one)[:, 0]
            reads = replacement.blocks[one].reads
            rows = replacement.transcoders.coder(one).encoder_rows(replacement.feature[chosen[mine]], out)
            out[mine] = reads.fold(rows) * reads.scale[position[some][mine], None]
        return out

    return Rows(2 * layer + late[layer], position, directions)


def logit_rows(replacement: LocalReplacement, targets: LogitTargets) -> Rows:
    """The rows of logits: their directions through the frozen final norm, at the last position."""
    last = replacement.n_positions - 1
    folded = replacement.final.fold(targets.directions) * replacement.final.scale[last]
    place = torch.full((len(targets),), 0, device=folded.device)
    return Rows(place + 2 * replacement.n_layers, place + last, lambda some: folded[some])


def feature_biases(replacement: LocalReplacement, which: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """What the constants (position embeddings, biases) give to features' pre-activations, their own bias included."""
    out = replacement.tokens.new_empty(len(which))
    for one in replacement.layer[which].unique().tolist():
        mine = torch.nonzero(replacement.layer[which] == one)[:, 0]
        coder, features = replacement.transcoders.coder(one), replacement.feature[which[mine]]
        given = replacement.read_constants[one][replacement.position[which[mine]]]
        out[mine] = (coder.encoder_rows(features, out) * given).sum(1) + coder.biases(features, out)
    return out


def logit_biases(replacement: LocalReplacement, targets: LogitTargets) -> Float[Tensor, " logit"]:
    """What the constants give to logits."""
    final = replacement.final
    given = (final.linear(replacement.constants[-1]) + final.bias)[-1]
    return targets.directions @ given + targets.constants


def describe(targets: LogitTargets) -> dict[str, Any]:
    """The targets as plain values for a record."""
    return {
        "ids": list(targets.ids), "names": list(targets.names), "probabilities": targets.probabilities.tolist()
    }  # fmt: skip
