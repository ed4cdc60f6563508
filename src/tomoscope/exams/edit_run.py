"""One trace, one edit: what `tomoscope trace` and `tomoscope edit` run, as plain documents and a treatment.

Where no layer is named, the edit goes where tracing of the same facts points (the MLP whose restored output brings most
of the answer back, at the subject's last or the prompt's last token); the document says so. How it can mislead: that
place need not be the best one (`facts.editing` measures others), and a fact that the model does not know has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.circuits import causal_trace, noise_scale
from tomoscope.data import Corpus
from tomoscope.errors import DataError, EditError, nearest
from tomoscope.exams.tracing import LAST, SUBJECT, aligned
from tomoscope.findings.estimate import Estimate
from tomoscope.model import Subject
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.tasks import speaks_of_the_world
from tomoscope.treat.edit.effects import compare, measure, relative_norms
from tomoscope.treat.edit.keys import Edited, default_layer, weight_name
from tomoscope.treat.edit.memit import alphaedit, memit
from tomoscope.treat.edit.moments import key_layers, second_moments
from tomoscope.treat.edit.requests import (
    PLACES,
    EditRequest,
    check_requests,
    encode_labelled,
    read_requests,
    target_ids,
)
from tomoscope.treat.edit.rome import rome
from tomoscope.treat.edit.tune import TuneSettings, finetune, lora
from tomoscope.treat.treatment import Treatment

METHODS = ("rome", "rome-paper", "memit", "alphaedit", "ft", "ft-l", "lora")
WITH_MOMENTS = METHODS[:4]
_TRACED, _TEXTS, _LONGEST = 8, 64, 512
Progress = Callable[[int, int], None]


def trace_fact(
    subject: Subject, prompt: str, about: str, *, answer: str = "", kind: str = "mlp", window: int = 1, draws: int = 10,
    factor: float = 3.0, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Causal trace of one fact: tokens, effects [token, layer], and the place where most comes back.

    Args:
        prompt: names the subject once, or has "{}" in its place.
        about: the subject.
        answer: the model's first answer by default.
        kind, window, draws: see `causal_trace`.
        factor: noise in standard deviations of the subject's embeddings.
        seed: of the noise.

    Raises:
        EditError: the subject is not in the prompt.
    """
    asked = EditRequest.of_text(prompt, about, answer or "?")
    labelled = asked.labelled()
    batch = encode_labelled(subject, labelled)
    said = subject.last_logits([batch]).softmax(-1)[0]
    token = target_ids(subject, labelled, answer)[0] if answer else int(said.argmax())
    sigma = noise_scale(subject, [labelled], factor=factor)
    found = causal_trace(subject, labelled, token, kind=kind, sigma=sigma, draws=draws, window=window, seed=seed)
    effect = found.effect.double().numpy()
    place, layer = (int(x) for x in np.unravel_index(int(effect.argmax()), effect.shape))
    return {
        "prompt": asked.text, "subject": about, "answer": subject.tokenizer.decode([token]),
        "first_answer": subject.tokenizer.decode([int(said.argmax())]), "probability": found.clean,
        "under_noise": float(found.corrupted.mean()), "kind": kind, "window": found.window, "sigma": sigma,
        "draws": draws, "seed": seed, "tokens": list(found.tokens), "subject_tokens": list(found.subject),
        "effect": effect.round(6).tolist(),
        "peak": {"token": place, "text": found.tokens[place], "layer": layer, "effect": float(effect[place, layer])},
    }  # fmt: skip


def traced_place(subject: Subject, requests: Sequence[EditRequest], *, seed: int = 0) -> tuple[str, int] | None:
    """Place and layer whose restored MLP brings most back, over the first facts; None where nothing can be traced."""
    some = [one for one in requests if one.target_true][:_TRACED] or list(requests)[:_TRACED]
    prompts = [one.labelled() for one in some]
    try:
        sigma = noise_scale(subject, prompts)
        rows = []
        for prompt in prompts:
            token = int(subject.last_logits([prompt]).argmax())
            trace = causal_trace(subject, prompt, token, kind="mlp", sigma=sigma, draws=5, window=1, seed=seed)
            rows.append(aligned(trace.effect.double().numpy(), *trace.subject)[[SUBJECT, LAST]])
    except DataError:
        return None
    layers = key_layers(subject)
    mean = np.mean(rows, axis=0)[:, layers]
    place, layer = (int(x) for x in np.unravel_index(int(mean.argmax()), mean.shape))
    return PLACES[place], layers[layer]


def edit_facts(
    subject: Subject,
    requests: Sequence[EditRequest],
    *,
    method: str = "rome",
    layers: Sequence[int] | None = None,
    at: str | None = None,
    texts: Path | None = None,
    tokens: int | None = None,
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Treatment, dict[str, Any]]:
    """Make an edit and measure it.

    Args:
        subject: unchanged afterwards.
        requests: facts with their probes.
        method: one of `METHODS`.
        layers: where to write; the first facts are traced by default.
        at: "subject" or "last", likewise.
        texts: corpus of the second moments and of the held-out loss; the embedded model brings its own.
        tokens: of the second moments.
        cache: a folder for them.
        seed: of everything drawn.
        progress: called with (done, in all).

    Raises:
        EditError: a request that makes no sense, an unknown method or layer.
        DataError: no corpus for a method that needs one.
    """
    if method not in METHODS:
        raise EditError(f"There is no method {method!r}.", remedy=nearest(method, METHODS) or ", ".join(METHODS))
    check_requests(subject, requests)
    key_layers(subject, layers)
    corpus_of, held_out = _texts(subject, texts, method, seed)
    how = "as asked"
    if layers is None:
        found = traced_place(subject, requests, seed=seed) if at is None else None
        how = "where tracing points" if found else "a third of the way up"
        place, layer = found or (at or "subject", default_layer(subject))
        at, layers = at or place, [layer]
    at = at or "subject"
    moments = None
    if method in WITH_MOMENTS:
        moments = second_moments(subject, corpus_of, layers=layers, tokens=tokens, cache=cache, progress=progress)
    before = measure(subject, requests, texts=held_out)
    made = _made(subject, requests, method, moments, list(layers), at, seed, progress)
    first = [subject.tokenizer.decode([i]) for i in _first(subject, requests)]
    with made.treatment.applied(subject):
        after = measure(subject, requests, texts=held_out)
        then = [subject.tokenizer.decode([i]) for i in _first(subject, requests)]
    scores = compare(before, after, seed=seed)
    point = moments.curve[-1] if moments is not None and moments.curve else None
    return made.treatment, {
        "method": made.treatment.origin.method, "facts": len(requests), "layers": list(layers), "at": at, "place": how,
        "seed": seed, "model": subject.name, "notes": made.notes,
        "relative_norms": relative_norms(subject, made.treatment.norms()),
        "answers": [
            {"prompt": one.text, "wanted": one.target_new.strip(), "before": a.strip(), "after": b.strip()}
            for one, a, b in zip(requests, first, then, strict=True)
        ],
        "second_moments": None if moments is None else {
            "tokens": moments.tokens, "agreement_after_last_doubling": None if point is None else point.agreement
        },
        "scores": [
            {"name": s.name, "protocol": s.protocol, "after": _plain(s.estimate), "before": _plain(s.before),
             "change": _plain(s.change)}
            for s in scores
        ],
        "not_measured": _lacking({s.name for s in scores}),
    }  # fmt: skip


def requests_of(path: Path | None, prompt: str, about: str, target: str, limit: int | None = None) -> list[EditRequest]:
    """The requests of a file, or the one of the command line. Raises EditError where both or neither are given."""
    if (path is None) == (not (prompt or about or target)):
        raise EditError(
            "An edit is one fact, or a file of facts.",
            remedy="Give --prompt, --subject and --target, or --requests.",
        )
    return read_requests(path, limit=limit) if path is not None else [EditRequest.of_text(prompt, about, target)]


def _first(subject: Subject, requests: Sequence[EditRequest]) -> list[int]:
    return subject.last_logits([one.labelled() for one in requests]).argmax(-1).tolist()


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.model_dump(mode="json")


def _lacking(there: set[str]) -> dict[str, str]:
    """Score -> why it is not among the figures."""
    needs = {
        "paraphrase": "no request has paraphrases", "neighbourhood": "no request has neighbours",
        "reasoning": "no request has reasoning probes", "reversed": "no request has reversed questions",
        "loss on text": "no held-out text was given (--corpus)",
    }  # fmt: skip
    return {name: why for name, why in needs.items() if name not in there}


def _texts(subject: Subject, path: Path | None, method: str, seed: int) -> tuple[Any, list[str]]:
    if path is not None:
        held_out = [one.text[: 8 * _LONGEST] for one in islice(Corpus(path).documents(), _TEXTS)]
        documents = (one for place, one in enumerate(Corpus(path).documents()) if place >= _TEXTS)
        return list(documents) or Corpus(path), held_out
    if speaks_of_the_world(subject.tokenizer):
        world = shipped_world()
        held_out = list(islice(corpus(world, seed=seed, split="held out"), _TEXTS))
        return corpus(world, seed=seed, split="moments"), held_out
    if method in WITH_MOMENTS:
        raise DataError(
            f"{method} needs text for the second moments of keys.",
            remedy="Give --corpus, any text like the model's own.",
        )
    return None, []


def _made(
    subject: Subject, requests: Sequence[EditRequest], method: str, moments: Any, layers: list[int], at: str, seed: int,
    progress: Progress | None,
) -> Edited:  # fmt: skip
    if method in ("rome", "rome-paper"):
        if len(layers) != 1:
            raise EditError(f"ROME writes to one layer, not to {len(layers)}.", remedy="Name one, or use memit.")
        form = "paper" if method == "rome-paper" else "averaged"
        return rome(subject, requests, moments, layer=layers[0], form=form, at=at, seed=seed, progress=progress)
    if method in ("memit", "alphaedit"):
        write = memit if method == "memit" else alphaedit
        return write(subject, requests, moments, layers=layers, at=at, seed=seed, progress=progress)
    weights = [subject.model.get_parameter(weight_name(subject, layer)).detach().float() for layer in layers]
    size = sum(float(weight.square().mean().sqrt()) for weight in weights) / len(weights)
    training = TuneSettings(rate=0.1 * size)
    if method == "lora":
        return lora(subject, requests, layers=layers, settings=training, seed=seed, progress=progress)
    bound = 0.3 * size if method == "ft-l" else None
    return finetune(subject, requests, layers=layers, bound=bound, settings=training, seed=seed, progress=progress)
