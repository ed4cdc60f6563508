"""Where specimens come from: each phantom with its null, and two nulls that need no phantom.

    untrained           the embedded model's architecture and tokenizer with fresh weights: does nothing
    shuffled_answers    the embedded model itself, asked for the answers of other prompts (a control task: Hewitt and
                        Liang 2019): all of a trained model's machinery, and no task that it does

How they can mislead: untrained weights are an easy null (most exams of a task stop at "does not do it"); shuffled
answers are harder, but they are one trained model, however many shufflings there are.

Steps: names to sources, sources and seeds to cases, a case to a specimen when its turn comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tomoscope.data import TASKS, Pair, PairSet, TaskSpec
from tomoscope.errors import DataError, nearest
from tomoscope.exams.calibration.memory import vocabulary
from tomoscope.findings.control import stable_seed
from tomoscope.phantoms import PHANTOMS, Card, Known, Phantom, Specimen
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS
from tomoscope.phantoms.world.tasks import speaks_of_the_world

Side = Literal["planted", "null"]
Make = Callable[[int], Specimen]

ROLES = ("previous_token", "duplicate_token", "induction", "copying", "name_mover")
ANSWERS = "answers"
"""Key of `Specimen.data` for what was done to the answers: such specimens of one model are different ones."""
PAIRS = "pairs"
"""Key of `Specimen.data` for a PairSet on which the specimen was built to be right."""
OWN_TASKS = "tasks"
"""Key of `Specimen.data` for tasks (name -> TaskSpec) that the specimen is asked besides the field's, or instead."""


@dataclass(frozen=True)
class Source:
    """A maker of specimens, with what is looked for (planted) and without (null)."""

    name: str
    title: str
    planted: Make | None
    null: Make | None
    varies: bool = True
    """False: one specimen is all there is."""

    @classmethod
    def of(cls, phantom: Phantom) -> Source:
        """A phantom as a source."""
        return cls(phantom.name, phantom.title, phantom.build, phantom.null, phantom.varies)


@dataclass(frozen=True)
class Case:
    """One specimen to be made and examined."""

    source: Source
    side: Side
    seed: int

    @property
    def key(self) -> str:
        """`phantom/planted/3`."""
        return f"{self.source.name}/{self.side}/{self.seed}"

    def make(self) -> Specimen:
        """The specimen."""
        make = self.source.planted if self.side == "planted" else self.source.null
        assert make is not None, self.key
        return with_pairs(make(self.seed))


def known_sources() -> dict[str, Source]:
    """All phantoms and the two further nulls, by name."""
    return {name: Source.of(phantom) for name, phantom in PHANTOMS.items()} | {one.name: one for one in NULLS}


def find_sources(names: Sequence[str | Phantom]) -> list[Source]:
    """The sources of these names (patterns with `*` too) or phantoms; all where none is named.

    Raises DataError with the nearest names.
    """
    known = known_sources()
    found: dict[str, Source] = {}
    for name in names or list(known):
        if isinstance(name, Phantom):
            found[name.name] = Source.of(name)
            continue
        matches = [one for one in known if fnmatch.fnmatchcase(one, name)]
        if not matches:
            hint = nearest(name, known)
            raise DataError(f"There is no phantom {name!r}.", remedy=f"{hint} There are: {', '.join(known)}.".strip())
        found |= {one: known[one] for one in matches}
    return list(found.values())


def cases(sources: Sequence[Source], seeds: int) -> list[Case]:
    """Every specimen of a calibration, seed by seed, so that one that was cut short is balanced."""
    return [
        Case(source, side, seed)
        for seed in range(seeds)
        for source in sources
        if source.varies or seed == 0
        for side in ("planted", "null")
        if getattr(source, side) is not None
    ]


def fingerprint(specimen: Specimen, otherwise: str) -> str:
    """What makes a specimen a different one: its weights, its tokenizer, and what was done to its answers."""
    from tomoscope.findings.provenance import hash_arrays

    model = getattr(specimen.subject, "model", None)
    if model is None or not hasattr(model, "state_dict"):
        return otherwise
    import torch

    weights = hash_arrays(
        (f"{name} {value.dtype}", value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, value in model.state_dict().items()
        if not value.is_meta and value.numel()
    )
    words = vocabulary(specimen.subject.tokenizer)
    rest = f"{words}{sorted(specimen.data.get(OWN_TASKS, ()))}{specimen.data.get(ANSWERS, '')}"
    return hashlib.sha256(f"{weights}{rest}".encode()).hexdigest()[:16]


def with_pairs(specimen: Specimen) -> Specimen:
    """A specimen that brings pairs of prompts (`data["pairs"]`), with a task made of them, which it does or does not.

    Its circuit is the task's. Where it holds, the model was built to do the task; where it is denied, it can't.
    """
    pairs, circuits = specimen.data.get(PAIRS), list(specimen.card.of("circuit"))
    if not isinstance(pairs, PairSet) or OWN_TASKS in specimen.data or not circuits:
        return specimen

    def make(tokenizer: Any, n: int, *, seed: int = 0, corruption: str = "") -> PairSet:
        return pairs[:n]

    name = pairs.name
    spec = TaskSpec(
        name, make, "logit_difference", specimen.card.description, "the phantom's own", (pairs.corruption or "given",)
    )
    known = [
        dataclasses.replace(one, value={**one.value, "task": one.value.get("task", name)}) if one in circuits else one
        for one in specimen.card.known
    ]
    can = Known("ability", {"task": name}, any(one.holds for one in circuits))
    card = dataclasses.replace(specimen.card, known=(*known, can))
    return Specimen(specimen.subject, card, {**specimen.data, OWN_TASKS: {name: spec}})


@contextlib.contextmanager
def tasks_as(tasks: Mapping[str, Any]) -> Generator[list[str]]:
    """For a while, `TASKS` with these besides or instead; gives the names that are new."""
    own = {name: spec for name, spec in tasks.items() if isinstance(spec, TaskSpec)}
    former = dict(TASKS)
    TASKS.update(own)
    try:
        yield [name for name in own if name not in former and name not in WORLD_TASKS]
    finally:
        TASKS.clear()
        TASKS.update(former)


def shuffled(spec: TaskSpec, seed: int) -> TaskSpec:
    """The task with each prompt's answers (right and wrong ones together) exchanged for another prompt's."""
    original = spec.make

    def make(tokenizer: Any, n: int, *, seed: int = seed, corruption: str = spec.corruptions[0]) -> PairSet:
        pairs = original(tokenizer, n, seed=seed, corruption=corruption)
        order = np.random.default_rng(stable_seed("shuffled answers", spec.name, shuffle, seed)).permutation(len(pairs))
        mixed = [
            Pair(one.clean, one.corrupted, pairs[int(k)].answers, pairs[int(k)].wrong, one.labels)
            for one, k in zip(pairs, order, strict=True)
        ]
        return PairSet(mixed, pairs.name, pairs.seed, pairs.corruption)

    shuffle = seed
    return dataclasses.replace(spec, make=make)


def _all_tasks(tokenizer: Any) -> dict[str, TaskSpec]:
    """The tasks that a model with this tokenizer is asked."""
    return TASKS | (WORLD_TASKS if speaks_of_the_world(tokenizer) else {})


def _cannot(tokenizer: Any) -> tuple[Known, ...]:
    return tuple(Known("ability", {"task": name}, holds=False) for name in _all_tasks(tokenizer))


def untrained(seed: int) -> Specimen:
    """The embedded model's architecture with fresh weights."""
    import torch

    from tomoscope.model import EMBEDDED, open_model

    base = open_model(EMBEDDED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("untrained", seed))
        model = type(base.model)(base.config).to(base.device).eval()
    roles = (Known("head_role", {"role": role, "heads": []}, holds=False) for role in ROLES)
    card = Card("untrained", seed, "Fresh weights: no task, no role of any head.", (*_cannot(base.tokenizer), *roles))
    return Specimen(open_model(model, tokenizer=base.tokenizer), card)


def shuffled_answers(seed: int) -> Specimen:
    """The embedded model, and the field's tasks with other prompts' answers."""
    from tomoscope.model import EMBEDDED, open_model

    subject, said = open_model(EMBEDDED), "A trained model; each prompt has another prompt's answers."
    card = Card("shuffled_answers", seed, said, _cannot(subject.tokenizer))
    tasks = {name: shuffled(spec, seed) for name, spec in _all_tasks(subject.tokenizer).items()}
    return Specimen(subject, card, {OWN_TASKS: tasks, ANSWERS: f"shuffled {seed}"})


NULLS = (
    Source("untrained", "Fresh weights of the embedded model", None, untrained),
    Source("shuffled_answers", "The embedded model, asked for other prompts' answers", None, shuffled_answers),
)
