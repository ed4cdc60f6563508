"""Causal tracing: noise on the subject, one clean state restored; where is the fact recalled?

The embeddings of the subject's tokens get Gaussian noise (3 standard deviations of the subjects' embeddings), several
draws; the answer's probability falls. Then one state of the clean run is restored at a (token, layer), or a window of
layers of MLP or attention outputs, and the recovery is the indirect effect.

How it can mislead: noise takes the model off its distribution (compare with a corrupted *prompt*,
`activation_patching`); a window of ten layers restores more than one does; where tracing points need not be where
editing works (Hase et al. 2023). Sources: Meng et al. 2022 (arXiv:2202.05262); Zhang & Nanda 2024 on the choice of
corruption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.metrics import Metric, Probability
from tomoscope.circuits.patching.engine import Engine
from tomoscope.errors import PromptError, SiteError, UnavailableSiteError
from tomoscope.model import Subject, add, scatter

KINDS = {"hidden": "resid_post", "mlp": "mlp.out", "attn": "attn.out"}


@dataclass(frozen=True)
class Trace:
    """Causal traces of one prompt.

    Attributes:
        values: [token, layer, draw] metric with one state (or window) restored.
        clean: metric of the clean run.
        corrupted: [draw] metric of the noised run.
        kind: "hidden", "mlp" or "attn".
        window: layers restored together (1 for "hidden").
        tokens: the prompt's tokens as text.
        subject: (first, one past the last) token of the subject.
        sigma: standard deviation of the noise.
        mode: how the engine ran.
    """

    values: Float[Tensor, "token layer draw"]
    clean: float
    corrupted: Float[Tensor, " draw"]
    kind: str
    window: int
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    sigma: float
    mode: str

    @property
    def effect(self) -> Float[Tensor, "token layer"]:
        """Mean over draws of the recovery: restored less noised."""
        return (self.values - self.corrupted).mean(-1)


def noise_scale(subject: Subject, prompts: Sequence[Any], *, span: str = "subject", factor: float = 3.0) -> float:
    """`factor` standard deviations of the token embeddings of the prompts' subjects (one number over all
    coordinates).
    """
    acts = [subject.read([prompt], "embed", at=f"{span}.all")["embed"].flatten() for prompt in prompts]
    return factor * float(torch.cat(acts).std())


def causal_trace(
    subject: Subject,
    prompt: Any,
    answer: int,
    *,
    kind: str = "hidden",
    span: str = "subject",
    sigma: float,
    draws: int = 10,
    window: int = 10,
    metric: Metric | None = None,
    seed: int = 1,
    noise: Float[Tensor, "draw token d_model"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Trace one fact.

    Args:
        subject: a decoder.
        prompt: with a labelled span of the thing it is about.
        answer: token id of the answer.
        kind: "hidden" restores the stream after a block, "mlp" or "attn" a window of that part's outputs.
        span: the label of the span.
        sigma: the noise's standard deviation (`noise_scale`).
        draws: of the noise, run as one batch.
        window: layers restored together for "mlp" and "attn": [l - w//2, l + ceil(w/2)), clipped.
        metric: probability of the answer by default; of `draws` rows.
        seed: of the noise.
        noise: the noise itself in units of sigma, in place of the seed.
        progress: called with tokens done and in all.
    """
    if kind not in KINDS:
        raise SiteError(f"{kind!r} can't be traced.", remedy=f"It is one of {', '.join(KINDS)}.")
    one = subject.tokens([prompt])
    known = subject.sites()
    lacking = [i for i in range(subject.facts.n_layers) if not known[f"layer.{i}.{KINDS[kind]}"].available]
    if lacking:
        site = f"layer.{lacking[0]}.{KINDS[kind]}"
        raise UnavailableSiteError(f"{site} can't be given, so {kind!r} can't be traced: {known[site].reason}.")
    if span not in one.prompts[0].spans:
        raise PromptError(f"The prompt has no span {span!r}.", remedy='Label it: "The {subject:Space Needle} is in".')
    first, end = one.prompts[0].spans[span]
    width = subject.facts.d_model or 1
    if noise is None:
        noise = torch.randn(draws, end - first, width, generator=torch.Generator().manual_seed(seed))
    draws = len(noise)
    batch = one.take(torch.zeros(draws, dtype=torch.long))
    corrupt = add("embed", noise * sigma, at=f"{span}.all")
    metric = metric or Probability([answer] * draws)
    engine = Engine(subject, batch, edits=[corrupt])
    part, length, n_layers = KINDS[kind], one.lengths[0], subject.facts.n_layers
    window = 1 if kind == "hidden" else window
    values = _restored(engine, subject, one, part, window, metric, progress)
    clean = metric(_columns(subject.last_logits(one), metric), torch.tensor([0]))
    corrupted = metric(_columns(engine.logits, metric), torch.arange(draws)).cpu()
    tokens = _texts(subject, one.prompts[0].ids)
    shaped = values.reshape(length, n_layers, draws)
    return Trace(shaped, float(clean), corrupted, kind, window, tokens, (first, end), sigma, engine.mode)


@torch.no_grad()
def severed_trace(
    subject: Subject,
    prompt: Any,
    answer: int,
    *,
    sever: str,
    span: str = "subject",
    token: int | None = None,
    sigma: float,
    draws: int = 10,
    seed: int = 1,
    noise: Float[Tensor, "draw token d_model"] | None = None,
    held_noise: Float[Tensor, "draw token d_model"] | None = None,
) -> Float[Tensor, "layer draw"]:
    """Restore a state while one kind of module at that token can't react to it: which does the recovery go through?

    The clean stream is put back after each layer at one token, and that token's outputs of every MLP (or attention)
    above are held at what they were in the noised run. Where the recovery of early layers vanishes with MLPs severed
    but not with attention severed, MLPs did the recall (Meng et al. 2022, figure 3).

    Args:
        sever: "mlp" or "attn".
        token: position in the prompt; the span's last by default.
        subject, prompt, answer, span, sigma, draws, seed, noise: see `causal_trace`.
        held_noise: of the run that the held outputs come from; the same by default (the paper's code draws it anew).

    Returns:
        [layer, draw] probability of the answer; subtract `Trace.corrupted` for the effect.
    """
    if sever not in ("mlp", "attn"):
        raise SiteError(f"{sever!r} can't be severed.", remedy="It is mlp or attn.")
    one = subject.tokens([prompt])
    if span not in one.prompts[0].spans:
        raise PromptError(f"The prompt has no span {span!r}.", remedy='Label it: "The {subject:Space Needle} is in".')
    first, end = one.prompts[0].spans[span]
    place, n_layers = end - 1 if token is None else token, subject.facts.n_layers
    part = KINDS[sever]
    subject.resolve([f"layer.{layer}.{part}" for layer in range(n_layers)])
    if noise is None:
        shape = (draws, end - first, subject.facts.d_model or 1)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    draws = len(noise)
    clean = subject.read(one, "layer.*.resid_post", at=place)
    corrupt = add("embed", (noise if held_noise is None else held_noise) * sigma, at=f"{span}.all")
    held = subject.read(one.take(torch.zeros(draws, dtype=torch.long)), f"layer.*.{part}", at=place, edits=[corrupt])
    edits = [add("embed", (noise * sigma).repeat(n_layers, 1, 1), at=f"{span}.all")]
    column = torch.full((draws,), place)
    whole = torch.full((draws,), -1)
    for layer in range(n_layers):
        rows = torch.arange(draws) + layer * draws
        state = clean[f"layer.{layer}.resid_post"].expand(draws, -1)
        edits.append(scatter(f"layer.{layer}.resid_post", torch.stack([rows, column, whole], dim=1), state))
        every = torch.arange(n_layers * draws)
        index = torch.stack([every, column.repeat(n_layers), whole.repeat(n_layers)], dim=1)
        edits.append(scatter(f"layer.{layer}.{part}", index, held[f"layer.{layer}.{part}"].repeat(n_layers, 1)))
    tiled = one.take(torch.zeros(draws * n_layers, dtype=torch.long))
    said = subject.last_logits(tiled, edits=edits).double().softmax(-1)[:, answer]
    return said.reshape(n_layers, draws).cpu()


def _columns(logits: Tensor, metric: Metric) -> Tensor:
    return logits if metric.tokens is None else logits[:, metric.tokens.to(logits.device)]


def _restored(
    engine: Engine, subject: Subject, one: Any, part: str, window: int, metric: Metric, progress: Any
) -> Tensor:
    """[token, layer, draw]: each state or window of the clean run put back alone, the layers of a token as one
    batch.
    """
    n_layers, draws, length = subject.facts.n_layers, len(engine.batch), one.lengths[0]
    sites = [f"layer.{layer}.{part}" for layer in range(n_layers)]
    clean = subject.read(one, *sites, keep_device=True).stack(f"layer.*.{part}")[:, 0]  # [layer, token, width]
    out = torch.empty(length, n_layers, draws, dtype=engine.precision)
    if window == 1 and engine.mode == "sliced":
        columns = torch.arange(length).expand(draws, -1)
        engine.check(part, columns, clean[n_layers // 2].expand(draws, -1, -1), metric, layer=n_layers // 2)
        for layer in range(n_layers):
            out[:, layer] = engine.patches(layer, part, columns, clean[layer].expand(draws, -1, -1), metric)[:, 0]
            if progress is not None:
                progress(layer + 1, n_layers)
        return out
    step = max(1, engine.subject.rows_per_call(length) // draws)
    for token in range(length):
        for start in range(0, n_layers, step):
            centres = range(start, min(start + step, n_layers))
            out[token, start : start + len(centres)] = _window_batch(
                engine, clean, part, token, centres, window, metric
            )
        if progress is not None:
            progress(token + 1, length)
    return out


def _window_batch(
    engine: Engine, clean: Tensor, part: str, token: int, centres: range, window: int, metric: Metric
) -> Tensor:
    draws, n_layers = len(engine.batch), len(clean)
    spans = [(max(0, c - window // 2), min(n_layers, c - window // 2 + window)) for c in centres]
    rows = torch.arange(draws).repeat(len(centres))
    edits, lowest = [], min(low for low, _ in spans)
    for layer in range(lowest, max(high for _, high in spans)):
        inside = [place for place, (low, high) in enumerate(spans) if low <= layer < high]
        if not inside:
            continue
        mine = torch.cat([torch.arange(draws) + place * draws for place in inside])
        index = torch.stack([mine, torch.full_like(mine, token), torch.full_like(mine, -1)], dim=1)
        edits.append(scatter(f"layer.{layer}.{part}", index, clean[layer, token].expand(len(mine), -1)))
    return engine.with_edits(rows, lowest, metric, edits).reshape(len(centres), draws)


def _texts(subject: Subject, ids: Sequence[int]) -> tuple[str, ...]:
    if subject.tokenizer is None:
        return tuple(str(i) for i in ids)
    return tuple(subject.tokenizer.decode([i]) for i in ids)
