"""Do labels of features tell where they fire, and are they true of the world?

Labels are rules that need no model (`features.label_rules`). The features are those of a dictionary that the options
name; without one, the neurons of the middle layer's MLP stand in, either sign, the strongest few of a token. The text
is the micro-world's where the model speaks of it, and then the lexicon says what its words are; else the model's own
text, and labels are tokens and what stands before them.

Claims: labels tell, on texts they were not made from, on which the feature fires, better than the labels of other
features do; and features whose label names a sort of word (a city) fire on words of that sort in fresh text of the
world, more than features with other labels.

How it can mislead: neurons are polysemantic, and a rule names the commonest part of what one does; a label that holds
says when a feature fires, not what it is for. Dictionaries of untrained models have labels of single tokens that hold
as well: the second claim is the one that an untrained model fails.

Steps: codes and dashboards of a text, the most frequent features, labels on some texts, scores on others beside other
features' labels, and the sorts against the world's own words in text of another seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from tomoscope.errors import DataError, SiteError
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import own_text, speaks_text
from tomoscope.exams.ready import attempt, percent
from tomoscope.exams.world_words import world_lexicon
from tomoscope.features import (
    DashboardOptions,
    FeatureBook,
    Labeller,
    RuleExplainer,
    RuleJudge,
    ScoredLabel,
    SparseCoder,
    harvest_codes,
    import_coder,
    make_dashboards,
    neuron_coder,
    samples,
    say_of,
)
from tomoscope.features.book import Context as Window
from tomoscope.features.label_rules import Words
from tomoscope.findings.figures import bars
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.tasks import speaks_of_the_world

CLAIM = "Labels of features tell, on other texts, where the features fire."
SORTS = "Features whose label names a sort of word fire on words of that sort."
LEAST = 4


class LabelOptions(Options):
    """Which features, and on how much text."""

    coder: str = Field("", description="A dictionary's file or folder; without one, the middle layer's neurons.")
    site: str = Field("", description="What the dictionary reads, where it does not say so itself.")
    features: int = Field(32, ge=2, le=100_000, description="The most frequent features are labelled.")
    texts: int = Field(400, ge=8, le=10_000_000, description="Texts that are read.")
    length: int = Field(48, ge=8, le=4096, description="Tokens of each text, at most.")
    active: int = Field(8, ge=1, le=100_000, description="Neurons that count as firing at a token.")


def rows_for(context: Context, purpose: str) -> tuple[list[list[int]], str]:
    """Rows of token ids, and what they are."""
    subject, options = context.subject, context.options
    seed = context.seed_for(purpose)
    length = min(options.length, subject.facts.context or options.length)
    if speaks_of_the_world(subject.tokenizer):
        made = corpus(shipped_world(), seed=seed % 2**31, split="features")
        ids = (list(subject.tokenizer(text)["input_ids"])[:length] for text in made)
        return list(islice((row for row in ids if len(row) > 1), options.texts)), "the micro-world's text"
    return [list(row) for row in own_text(subject, n=options.texts, length=length, seed=seed)], "the model's own text"


def dictionary_for(context: Context, rows: list[list[int]]) -> SparseCoder:
    """The dictionary that the options name, or the neurons of the middle layer."""
    options, subject = context.options, context.subject
    if options.coder:
        coder = import_coder(options.coder)
        return coder if coder.reads or not options.site else _placed(coder, options.site)
    site = options.site or f"layer.{subject.facts.n_layers // 2}.mlp.post"
    total, n = torch.zeros(0), 0
    for piece in samples(subject, rows[: max(8, len(rows) // 8)], site):
        x = piece.values[site]
        total = x.sum(0) if not n else total + x.sum(0)
        n += len(x)
    return _placed(neuron_coder(total / n, options.active, name="neurons"), site)


def _placed(coder: SparseCoder, site: str) -> SparseCoder:
    from dataclasses import replace

    return replace(coder, reads=site, writes=site)


def run_labels(context: Context) -> Iterator[Finding]:
    """Both claims, from one pass over the text."""
    try:
        rows, source = rows_for(context, "text")
        coder = dictionary_for(context, rows)
    except (SiteError, DataError) as error:
        yield context.not_measured("labels", CLAIM, error.what)
        yield context.not_measured("sorts", SORTS, error.what)
        return
    with tempfile.TemporaryDirectory() as folder:
        labels, book = _labelled(context, coder, rows, Path(folder))
        yield attempt(context, "labels", CLAIM, lambda: _labels(context, labels, rows, source))
        yield attempt(context, "sorts", SORTS, lambda: _sorts(context, labels, coder, source))
        del book


def _labelled(
    context: Context, coder: SparseCoder, rows: list[list[int]], folder: Path
) -> tuple[list[ScoredLabel], FeatureBook]:
    subject = context.subject
    store = harvest_codes(subject, coder, rows, folder / "codes", skip_first=True)
    options = DashboardOptions(top=4, per_quantile=2, cofire_tokens=1)
    book = FeatureBook.open(make_dashboards(None, coder, store, folder / "book", options=options))
    counts = book.column("fires")
    order = [int(i) for i in np.argsort(-counts, kind="stable")[: context.options.features] if counts[i]]
    lexicon = world_lexicon() if speaks_of_the_world(subject.tokenizer) else {}
    labeller = Labeller(
        book, RuleExplainer(say_of(subject.tokenizer), lexicon), RuleJudge(), active=50, silent=50, shown=40,
        shuffles=3, seed=context.seed_for("labels") % 2**31,
    )  # fmt: skip
    return list(context.track(labeller.run(order), "features", total=len(order))), book


def _labels(context: Context, labels: list[ScoredLabel], rows: list[list[int]], source: str) -> Finding:
    scored = [
        (one, own, other)
        for one in labels
        if (own := one.detection.value) is not None and one.control
        and (other := one.control["detection"].value) is not None
    ]  # fmt: skip
    if len(scored) < LEAST:
        return context.not_measured(
            "labels", CLAIM, f"{len(scored)} features have a label and enough texts; {LEAST} are needed"
        )
    own, others = (np.array([pair[i] for pair in scored], dtype=float) for i in (1, 2))
    seed, unit = context.seed_for("interval"), "ROC area"
    stand = sum(bool(one.label) for one, _, _ in scored)
    return context.claim(
        "labels",
        f"Labels of {len(scored)} features tell, on other texts, on which the feature fires: mean ROC area "
        f"{own.mean():.2f}; {stand} of them stand by themselves.",
        estimate=bootstrap_interval(own, seed=seed, unit=unit),
        controls=[
            Control(
                name="labels of other features", estimate=bootstrap_interval(others, seed=seed, unit=unit),
                description="For each feature the mean over three labels of other features, on the same texts.",
            )
        ],
        p_value=sign_flip_test(own - others, seed=context.seed_for("test")),
        test="paired sign-flip test over features", figures=[_figure(context, scored)],
        chosen_on=DataNote(name=f"{source}, texts shown", n=len(rows)),
        measured_on=DataNote(name=f"{source}, other texts of each feature", n=len(rows)), rule="labels",
    )  # fmt: skip


def _figure(context: Context, scored: list[Any]) -> Any:
    ordered = sorted(scored, key=lambda one: -one[1])[:24]
    return context.figure(
        "labels",
        bars(
            [one[1] for one in ordered], labels=[f"{one[0].latent}: {one[0].proposed[:40]}" for one in ordered],
            value_axis="ROC area", title="How well each label tells where its feature fires",
            caption="On texts that the label was not made from; 0.5 is chance.",
        ),
    )  # fmt: skip


def _sorts(context: Context, labels: list[ScoredLabel], coder: SparseCoder, source: str) -> Finding:
    """The share of the tokens on which a feature fires, in fresh text, that are of the sort its label names."""
    subject = context.subject
    if not speaks_of_the_world(subject.tokenizer):
        return context.not_measured("sorts", SORTS, "what words are is known for the micro-world alone")
    lexicon = world_lexicon()
    named = {one.latent: sort for one in labels if one.label and (sort := _sort_of(one.label, lexicon))}
    if len(named) < LEAST or len(set(named.values())) < 2:
        return context.not_measured(
            "sorts", SORTS, f"{len(named)} labels name a sort of word ({len(set(named.values()))} sorts); "
            f"{LEAST} and 2 are needed",
        )  # fmt: skip
    rows, _ = rows_for(context, "fresh text")
    say = say_of(subject.tokenizer)
    latents, sorts = list(named), sorted(set(named.values()))
    words = Words({sort: lexicon[sort] for sort in sorts})
    hits, fires = np.zeros((len(latents), len(sorts))), np.zeros(len(latents))
    for piece in samples(subject, rows, coder.reads, skip_first=True):
        codes = coder.encode(piece.values[coder.reads])[:, latents] > 0
        for row in piece.prompt.unique().tolist():
            here = piece.prompt == row
            tokens = piece.token[here].numpy()
            window = Window(tokens, np.zeros(len(tokens), dtype=np.float32), 0, 0, row)
            masks = words.masks([window], say)
            on = codes[here].numpy()
            fires += on.sum(0)
            hits += np.stack([(on & masks[sort][:, None]).sum(0) for sort in sorts], -1)
    alive = fires >= LEAST
    shares = hits[alive] / fires[alive][:, None]
    mine = np.array([sorts.index(named[latent]) for latent, ok in zip(latents, alive, strict=True) if ok])
    if len(mine) < LEAST:
        return context.not_measured("sorts", SORTS, "the features hardly fire in fresh text")
    own = shares[np.arange(len(mine)), mine]
    # another feature's sort: the mean over the features whose label names another one
    others = np.array([shares[i, mine[mine != mine[i]]].mean() for i in range(len(mine)) if (mine != mine[i]).any()])
    seed, unit = context.seed_for("sorts"), "share of firing tokens"
    return context.claim(
        "sorts",
        f"{len(own)} features whose label names a sort of word fire on words of that sort: "
        f"{percent(float(own.mean()))} of their tokens in fresh text.",
        estimate=bootstrap_interval(own, seed=seed, unit=unit),
        controls=[
            Control(
                name="sorts that other labels name", estimate=bootstrap_interval(others, seed=seed, unit=unit),
                description="The same features' tokens against the sorts of the others' labels (labels shuffled).",
            )
        ],
        p_value=sign_flip_test(own - others, seed=context.seed_for("sorts test")),
        test="paired sign-flip test over features", chosen_on=DataNote(name=f"{source}, one seed"),
        measured_on=DataNote(name=f"{source}, another seed", n=len(rows)), rule="sorts", sites=[coder.reads],
    )  # fmt: skip


def _sort_of(label: str, lexicon: dict[str, set[str]]) -> str:
    """The sort that a label names first, where it names one: "in a city, or ..."."""
    first = label.split(", or ")[0]
    return first.removeprefix("in a ") if first.startswith("in a ") and first.removeprefix("in a ") in lexicon else ""


LABELS = Exam(
    name="features.labels",
    title="What features are called",
    question="Do labels of features tell where they fire, and are they true of the world?",
    run=run_labels,
    rule={
        "labels": Rule(minimum=0.1, note="Features are the observations."),
        "sorts": Rule(minimum=0.1, note="Features are the observations."),
    },
    options=LabelOptions,
    presets={"quick": {"texts": 150, "features": 16}, "deep": {"texts": 2000, "features": 128}},
    applies=speaks_text,
    method=(
        "Rules over tokens are learned from texts with activations and scored on other texts. Features of untrained "
        "weights have labels that hold as well: only labels that are true of the world say that something was learned."
    ),
    cost=2.0,
)
"""The exam of labels."""
