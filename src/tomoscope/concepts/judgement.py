"""What a model takes to be true, by truth directions read in a neutral context, item by item.

    judged = judgements(subject, asked)
    judged.margin        [item] above 0: the first completion is taken to be true
    judged.accuracy      on items whose sources the directions never saw

Each item's two completions are made into statements ("Mary was born in Lyon"), the statements put into frames (by
itself, or "Claim: ... This claim is"), and read at the last token. Directions (`concepts.truth`) are learned from other
items whose right completion is known, or from labelled statements of one's own. Which frame and which layer read truth
is chosen on the part that the directions are learned from; a half of the sources is judged by directions of the other
half, and the other way round.

How it can mislead: a frame asks for a verdict, so its last token may hold what the model is about to say rather than
what it takes to be true; a model that lies in the neutral frame too is taken at its word. At chance (`accuracy`), a
margin says nothing of the model's belief. Items whose verdicts the model was trained on are judged better than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tomoscope.concepts.belief import Asked
from tomoscope.concepts.direction import Direction
from tomoscope.concepts.splits import cluster_index, split
from tomoscope.concepts.states import States, collect
from tomoscope.concepts.truth import truth_directions
from tomoscope.data.labelled import LabelledTexts
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.model import Subject

FRAMES: tuple[str, ...] = ("{statement}.", "Claim: {statement}. This claim is")
"""A statement without its full stop is put in; read at the last token."""
_FEWEST = 16


@dataclass(frozen=True, eq=False)
class Judgements:
    """Items judged by truth directions.

    Attributes:
        margin: [item] how much truer the first completion is than the second; NaN where it was not measured.
        swayed: [item] the same with the setting's context before the frame; NaN where an item has none.
        right: [item] 1 where the first completion is right, 0 where the second is, -1 where it is not known.
        sources: [item] numbers.
        frames, sites: that were chosen, one for each half (or one, with statements of one's own).
        directions: likewise.
        missing: why nothing was measured; "" where it was.
        seed: of intervals.
    """

    margin: Float[np.ndarray, " item"]
    swayed: Float[np.ndarray, " item"]
    right: np.ndarray
    sources: np.ndarray
    frames: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = ()
    missing: str = ""
    seed: int = 0

    @property
    def accuracy(self) -> Estimate:
        """Share of items with a known answer of which the right completion is judged the truer one."""
        unit, known = "share of items", self.right >= 0
        if self.missing or not known.any():
            return Estimate.unknown(self.missing or "no item's right completion is known", unit=unit)
        hit = ((self.margin > 0) == (self.right == 1))[known].astype(float)
        return bootstrap_interval(hit, seed=self.seed, clusters=self.sources[known], unit=unit)


def judgements(
    subject: Subject,
    asked: Sequence[Asked],
    *,
    statements: LabelledTexts | None = None,
    polarity: Sequence[int] | None = None,
    frames: Sequence[str] = FRAMES,
    sites: Any = "layer.*.resid_post",
    seed: int = 0,
) -> Judgements:
    """Judge items; without any labels the reason stands in `missing`.

    Args:
        subject: the model.
        asked: the items.
        statements: to learn from (two classes, the second true; groups are topics); else the items' own right ones.
        polarity: of those statements, 1 affirmative and -1 negated.
        frames: into which statements are put.
        sites: where truth may be read.
        seed: of halves, folds and intervals.

    Raises:
        DataError: a frame without {statement}; statements of other than two classes.
    """
    if not frames or any("{statement}" not in frame for frame in frames):
        raise DataError("A frame says where the statement stands.", remedy="Write {statement} in it.")
    if statements is not None and len(statements.classes) != 2:
        raise DataError(f"{statements.name} has {len(statements.classes)} classes.", remedy="Label true and false.")
    n = len(asked)
    sources = cluster_index([i if one.source is None else one.source for i, one in enumerate(asked)])
    right = np.array([-1 if one.right is None else one.right for one in asked])
    nothing = np.full(n, np.nan)
    read = _Reader(subject, asked, frames, sites)
    if statements is not None:
        learned = _learn(
            _states(subject, frames, statements.texts, sites), statements.labels, _topics(statements), polarity,
            statements.clusters, statements.name, seed,
        )  # fmt: skip
        margin, swayed = read.margins(learned, np.arange(n))
        return Judgements(margin, swayed, right, sources, (learned[0],), (learned[1].site,), (learned[1],), seed=seed)
    known = np.flatnonzero(right >= 0)
    if len(known) < _FEWEST or len(np.unique(sources[known])) < 4:
        why = f"{len(known)} items have a known answer, and {_FEWEST} of four sources are needed to learn what truth is"
        return Judgements(nothing, nothing, right, sources, missing=why)
    topics = [sources[i] if one.topic is None else one.topic for i, one in enumerate(asked)]
    halves = [known[part] for part in split(sources[known], share=0.5, seed=seed)]
    margin, swayed, kept = nothing.copy(), nothing.copy(), []
    for place, half in enumerate(halves):
        rows, labels = read.statements(half)
        which = [topics[i] for i in rows[:, 0]]
        if len(set(which)) < 2 or len(np.unique(labels)) < 2:
            return Judgements(nothing, nothing, right, sources, missing="a half of the sources has one topic or label")
        learned = _learn(read.states(rows), labels, which, None, [sources[i] for i in rows[:, 0]], "the items", seed)
        kept.append(learned)
        others = np.flatnonzero(~np.isin(sources, sources[half]))
        others = others if place == 0 else others[right[others] >= 0]  # unknown ones are judged once
        margin[others], swayed[others] = read.margins(learned, others)
    return Judgements(
        margin, swayed, right, sources, tuple(frame for frame, _ in kept), tuple(one.site for _, one in kept),
        tuple(one for _, one in kept), seed=seed,
    )  # fmt: skip


def _topics(statements: LabelledTexts) -> Sequence[Any]:
    return statements.groups if len(set(statements.groups)) > 1 else statements.clusters


def _bare(statement: str) -> str:
    return statement.strip().rstrip(".!?").rstrip()


def _states(subject: Subject, frames: Sequence[str], texts: Sequence[str], sites: Any) -> dict[str, States]:
    framed = [frame.replace("{statement}", _bare(text)) for frame in frames for text in texts]
    states, n = collect(subject, framed, sites), len(texts)
    return {frame: states.take(range(i * n, (i + 1) * n)) for i, frame in enumerate(frames)}


def _learn(states, labels, topics, polarity, clusters, name: str, seed: int) -> tuple[str, Direction]:
    """The frame and site that judge unseen topics best, and the direction there."""
    best: tuple[float, str, Direction] | None = None
    for frame, some in states.items():
        found = truth_directions(some, labels, topics, polarity, clusters=clusters, fitted_on=name, seed=seed)
        value = float(found.right[found.sites.index(found.best)].mean())
        if best is None or value > best[0]:
            best = (value, frame, found.directions[found.best])
    assert best is not None
    return best[1], best[2]


class _Reader:
    """The items' statements, read once in every frame."""

    def __init__(self, subject: Subject, asked: Sequence[Asked], frames: Sequence[str], sites: Any) -> None:
        self.subject, self.asked, self.frames = subject, asked, tuple(frames)
        said, self.rows = [], []
        for i, one in enumerate(asked):
            for side, text in enumerate(one.statements):
                said.append(text)
                self.rows.append((i, side))
        self.said, self.all = said, _states(subject, frames, said, sites)
        self.place = {row: k for k, row in enumerate(self.rows)}

    def statements(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[statement, 2] item and side of some items' statements, and whether each is true."""
        wanted = set(items.tolist())
        rows = np.array([row for row in self.rows if row[0] in wanted])
        return rows, np.array([int((self.asked[i].right == 1) == (side == 0)) for i, side in rows])

    def states(self, rows: np.ndarray) -> dict[str, States]:
        """Frame -> states of some statements."""
        places = [self.place[int(i), int(side)] for i, side in rows]
        return {frame: some.take(places) for frame, some in self.all.items()}

    def margins(self, learned: tuple[str, Direction], items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some items: the margin without and with the setting's context."""
        frame, direction = learned
        wanted = set(items.tolist())
        rows = np.array([row for row in self.rows if row[0] in wanted]).reshape(-1, 2)
        plain = direction.score(self.states(rows)[frame][direction.site]).double().numpy()
        margin = self._sides(rows, plain, items)
        with_context = np.array([bool(self.asked[i].context) for i, _ in rows], dtype=bool)
        swayed = np.full(len(items), np.nan)
        if with_context.any():
            some = rows[with_context]
            said = [_bare(self.said[self.place[int(i), int(side)]]) for i, side in some]
            framed = [frame.replace("{statement}", one) for one in said]
            texts = [f"{self.asked[i].context} {one}" for (i, _), one in zip(some, framed, strict=True)]
            found = direction.score(collect(self.subject, texts, direction.site)[direction.site]).double().numpy()
            swayed = self._sides(some, found, items)
        return margin, swayed

    @staticmethod
    def _sides(rows: np.ndarray, scores: np.ndarray, items: np.ndarray) -> np.ndarray:
        """First side less second (nothing, where there is one statement); NaN for items without rows."""
        out = dict.fromkeys(items.tolist(), np.nan)
        for (i, side), score in zip(rows.tolist(), scores, strict=True):
            out[i] = (0.0 if np.isnan(out[i]) else out[i]) + (score if side == 0 else -score)
        return np.array([out[i] for i in items.tolist()])
