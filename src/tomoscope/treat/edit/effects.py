"""What an edit did, wanted or not: the scores of the ROME and MEMIT papers, and what they leave out.

Measure a model before and after with the same probes, and compare:

    before = measure(subject, requests, texts=held_out)
    with treatment.applied(subject): after = measure(subject, requests, texts=held_out)
    for score in compare(before, after, seed=0): print(score.name, score.estimate, score.protocol)

Success is the protocol of CounterFact: of two answers the right one has the lower loss a token, forced, which
overstates what a model says by itself (2502.11177); the exact protocol asks that every token of the answer be the
model's first choice (still with the answer's earlier tokens given). Each score carries its protocol's name. Intervals
are over facts: probes of one fact count as one cluster.

How it can mislead: neighbours that share the true answer see only one kind of bleeding; perplexity on neutral text does
not see a model that is fluent and wrong. What was not asked for is missing, not zero.

Sources: Meng et al. 2022, 2023; Zhang et al. 2018 (n-gram entropy).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, difference_interval
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded, encode
from tomoscope.treat.edit.requests import EditRequest, Probe, target_ids

KINDS = ("efficacy", "paraphrase", "neighbourhood", "reasoning", "reversed")
FORCED = "teacher-forced, loss a token of the right answer below that of the other"
EXACT = "teacher-forced, every token of the answer the model's first choice"
_ROWS = 64
Behaviour = Callable[[Subject], np.ndarray]
"""A model -> one score an item."""


@dataclass(frozen=True, eq=False)
class Answers:
    """How a model takes some probes.

    Attributes:
        right: [probe] loss a token of the right answer.
        wrong: [probe] of the other; NaN where there is none.
        exact: [probe] every token of the right answer is the first choice.
        facts: [probe] number of the request.
    """

    right: Float[np.ndarray, " probe"]
    wrong: Float[np.ndarray, " probe"]
    exact: Bool[np.ndarray, " probe"]
    facts: np.ndarray

    @property
    def success(self) -> Float[np.ndarray, " probe"]:
        """1 where the right answer has the lower loss; NaN where there is no other."""
        return np.where(np.isnan(self.wrong), np.nan, (self.wrong > self.right).astype(float))

    @property
    def magnitude(self) -> Float[np.ndarray, " probe"]:
        """Probability (per token, geometric mean) of the right answer less that of the other."""
        return np.exp(-self.right) - np.exp(-self.wrong)

    def by_fact(self, values: Float[np.ndarray, " probe"], count: int) -> Float[np.ndarray, " fact"]:
        """Mean of each fact's probes; NaN where it has none."""
        out = np.full(count, np.nan)
        for fact in range(count):
            mine = values[self.facts == fact]
            mine = mine[~np.isnan(mine)]
            if len(mine):
                out[fact] = mine.mean()
        return out


@dataclass(frozen=True, eq=False)
class Measures:
    """One state of a model.

    Attributes:
        count: requests.
        answers: kind of probe -> answers.
        essence: [fact, vocab] log-probabilities after "SUBJECT is a".
        losses: [text] nats a token of held-out text.
        entropy: [fact] n-gram entropy of the model's continuations, bits; empty where none was asked for.
        consistency: [fact] cosine (TF-IDF) of continuations to texts about the new answer; empty likewise.
        behaviours: name -> a score an item.
    """

    count: int
    answers: Mapping[str, Answers]
    essence: Float[Tensor, "fact vocab"]
    losses: Float[np.ndarray, " text"]
    entropy: Float[np.ndarray, " fact"]
    consistency: Float[np.ndarray, " fact"]
    behaviours: Mapping[str, np.ndarray] = field(default_factory=dict)

    def per_fact(self, kind: str) -> Float[np.ndarray, " fact"]:
        """Success of one kind of probe, by fact."""
        if kind not in self.answers:
            return np.full(self.count, np.nan)
        return self.answers[kind].by_fact(self.answers[kind].success, self.count)


@dataclass(frozen=True)
class Score:
    """One number about an edit.

    Attributes:
        name: "paraphrase".
        protocol: how it was reached.
        estimate: after the edit, with its interval; clusters are facts.
        before: the same before.
        change: after less before, paired by fact.
    """

    name: str
    protocol: str
    estimate: Estimate
    before: Estimate | None = None
    change: Estimate | None = None


def measure(
    subject: Subject,
    requests: Sequence[EditRequest],
    *,
    texts: Sequence[str] = (),
    continue_tokens: int = 0,
    references: Mapping[str, Sequence[str]] | None = None,
    behaviours: Mapping[str, Behaviour] | None = None,
    seed: int = 0,
) -> Measures:
    """Look at the model as it is now.

    Args:
        subject: the model.
        requests: with their probes.
        texts: held out, for the loss.
        continue_tokens: of each generation prompt; 0 leaves generation out.
        references: new answer -> texts about things of which it is true.
        behaviours: what else to score.
        seed: of the continuations.

    Raises:
        DataError: no request.
    """
    if not requests:
        raise DataError("There is nothing to measure.", remedy="Give at least one request.")
    probes = probes_of(requests)
    answers = {kind: _answers(subject, some) for kind, some in probes.items() if some}
    essence = subject.last_logits([one.essence() for one in requests]).float().log_softmax(-1).cpu()
    losses = text_losses(subject, texts)
    entropy, consistency = _continuations(subject, requests, continue_tokens, references or {}, seed)
    scored = {name: np.asarray(score(subject), dtype=float) for name, score in (behaviours or {}).items()}
    return Measures(len(requests), answers, essence, losses, entropy, consistency, scored)


def probes_of(requests: Sequence[EditRequest]) -> dict[str, list[tuple[int, Probe]]]:
    """Kind -> (number of the request, probe)."""
    out: dict[str, list[tuple[int, Probe]]] = {kind: [] for kind in KINDS}
    for place, one in enumerate(requests):
        out["efficacy"].append((place, Probe(one.text, one.target_new, one.target_true)))
        out["paraphrase"] += [(place, Probe(text, one.target_new, one.target_true)) for text in one.paraphrases]
        out["neighbourhood"] += [(place, probe) for probe in one.neighbours]
        out["reasoning"] += [(place, probe) for probe in one.reasoning]
        out["reversed"] += [(place, probe) for probe in one.reversed]
    return out


@torch.no_grad()
def _answers(subject: Subject, probes: Sequence[tuple[int, Probe]]) -> Answers:
    rows: list[tuple[Encoded, tuple[int, ...], int, bool]] = []
    for place, (_, probe) in enumerate(probes):
        prompt = encode(probe.prompt, subject.tokenizer, context=subject.facts.context)
        for answer, is_right in ((probe.right, True), (probe.wrong, False)):
            if answer:
                ids = target_ids(subject, probe.prompt, answer)
                rows.append((Encoded((*prompt.ids, *ids[:-1]), {}, None), ids, place, is_right))
    right, wrong = np.full(len(probes), np.nan), np.full(len(probes), np.nan)
    exact = np.zeros(len(probes), dtype=bool)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].ids))
    for start in range(0, len(order), _ROWS):
        mine = [rows[i] for i in order[start : start + _ROWS]]
        run = subject.run([row for row, *_ in mine])
        for line, (_, ids, place, is_right) in enumerate(mine):
            end = int(run.batch.last[line]) + 1
            said = run.logits[line, end - len(ids) : end].float().log_softmax(-1)
            token = torch.tensor(ids, device=said.device)
            loss = -float(said.gather(-1, token[:, None]).mean())
            if is_right:
                right[place], exact[place] = loss, bool((said.argmax(-1) == token).all())
            else:
                wrong[place] = loss
    return Answers(right, wrong, exact, np.array([fact for fact, _ in probes]))


def text_losses(subject: Subject, texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    """Nats a token of each text."""
    out = np.zeros(len(texts))
    prompts = list(subject.tokens(list(texts)).prompts) if texts else []
    for start in range(0, len(prompts), _ROWS):
        run = subject.run(prompts[start : start + _ROWS])
        assert run.batch.input_ids is not None
        said = run.logits[:, :-1].float().log_softmax(-1)
        picked = said.gather(-1, run.batch.input_ids[:, 1:, None])[..., 0]
        mask = (run.batch.mask[:, :-1] & run.batch.mask[:, 1:]).to(picked)
        out[start : start + len(said)] = (-(picked * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()
    return out


def _continuations(
    subject: Subject, requests: Sequence[EditRequest], tokens: int, references: Mapping[str, Sequence[str]], seed: int
) -> tuple[Float[np.ndarray, " fact"], Float[np.ndarray, " fact"]]:
    if not tokens or not any(one.generation for one in requests):
        return np.empty(0), np.empty(0)
    prompts = [(place, text) for place, one in enumerate(requests) for text in one.generation]
    made = subject.generate([text for _, text in prompts], max_new_tokens=tokens, temperature=1.0, top_p=0.9, seed=seed)
    entropy, consistency = np.full(len(requests), np.nan), np.full(len(requests), np.nan)
    for place, one in enumerate(requests):
        mine = [text + said for (fact, text), said in zip(prompts, made, strict=True) if fact == place]
        if mine:
            entropy[place] = np.mean([ngram_entropy(text) for text in mine])
            about = references.get(one.target_new.strip(), ())
            if about:
                consistency[place] = tfidf_cosine(" ".join(mine), " ".join(about))
    return entropy, consistency


def ngram_entropy(text: str) -> float:
    """Weighted mean of bigram and trigram entropies of a text's words in bits: 2/3 and 4/3, as the papers' code has."""
    words = re.findall(r"\w+|[^\w\s]", text)
    total = 0.0
    for size, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = np.array(list(Counter(zip(*(words[i:] for i in range(size)), strict=False)).values()), dtype=float)
        if len(counts):
            share = counts / counts.sum()
            total += weight * float(-(share * np.log2(share)).sum())
    return total / 2


def tfidf_cosine(first: str, second: str) -> float:
    """Cosine of two texts' TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        one, other = TfidfVectorizer().fit_transform([first, second]).toarray()
    except ValueError:  # no words in either
        return 0.0
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30))


def compare(before: Measures, after: Measures, *, seed: int) -> list[Score]:
    """Every score that was measured both times, with intervals over facts (texts, items)."""
    out = []
    for kind in KINDS:
        if kind not in after.answers:
            continue
        then, now = before.answers[kind], after.answers[kind]
        parts = (
            (kind, FORCED, then.success, now.success),
            (f"{kind} magnitude", "probability of the right answer less that of the other, teacher-forced, a token",
             then.magnitude, now.magnitude),
            (f"{kind} exact", EXACT, then.exact.astype(float), now.exact.astype(float)),
        )  # fmt: skip
        out += [_score(name, how, a, b, now.facts, seed) for name, how, a, b in parts]
    whole = harmonic(after, seed=seed)
    if whole is not None:
        out.append(
            Score(
                "harmonic",
                "harmonic mean of efficacy, paraphrase and neighbourhood",
                whole,
                harmonic(before, seed=seed),
            )
        )
    moved = (after.essence.exp() * (after.essence - before.essence)).sum(-1).clamp(min=0).double().numpy()
    drift = bootstrap_interval(moved, seed=seed, unit="nats")
    out.append(Score("essence drift", 'KL, after against before, of the word after "SUBJECT is a"', drift))
    for name, how, a, b in (
        ("loss on text", "nats a token of held-out text", before.losses, after.losses),
        ("generation entropy", "2/3 bigram, 4/3 trigram entropy in bits, sampled at top-p 0.9", before.entropy,
         after.entropy),
        ("reference score", "TF-IDF cosine of continuations to texts about the new answer", before.consistency,
         after.consistency),
        *((name, "as the behaviour scores itself", before.behaviours[name], now)
          for name, now in after.behaviours.items() if name in before.behaviours),
    ):  # fmt: skip
        if len(b):
            out.append(_score(name, how, a, b, None, seed))
    return out


def _score(name: str, how: str, before: np.ndarray, after: np.ndarray, facts: np.ndarray | None, seed: int) -> Score:
    there = ~(np.isnan(before) | np.isnan(after))
    clusters = None if facts is None else facts[there].tolist()
    then, now = before[there], after[there]
    estimates = [bootstrap_interval(some, seed=seed, clusters=clusters) for some in (now, then)]
    change = difference_interval(now, then, seed=seed, paired=True, clusters=clusters) if len(now) else None
    return Score(name, how, estimates[0], estimates[1], change)


def harmonic(measures: Measures, *, seed: int) -> Estimate | None:
    """Harmonic mean of mean efficacy, paraphrase and neighbourhood success, over facts; None without all three."""
    parts = np.stack([measures.per_fact(kind) for kind in KINDS[:3]])
    parts = parts[:, ~np.isnan(parts).any(0)]
    if not parts.shape[1]:
        return None

    def reduce(rows: np.ndarray) -> np.ndarray:
        means = parts[:, np.asarray(rows).astype(int)].mean(-1)
        return np.where((means > 0).all(0), 3 / (1 / np.maximum(means, 1e-12)).sum(0), 0.0)

    return bootstrap_interval(np.arange(parts.shape[1], dtype=float), seed=seed, statistic=reduce, unit="")


def relative_norms(subject: Subject, norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of each change over the norm of the weight it changes: what grows as edits pile up before a model breaks."""
    return {
        name: norm / float(subject.model.get_parameter(name).detach().double().norm()) for name, norm in norms.items()
    }
