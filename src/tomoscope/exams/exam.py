"""The one contract of an exam: a method and its control make a claim.

An `Exam` is a frozen value: its name, the question it asks, the rule of its verdict (declared here, so before any run),
its options with their defaults, whether it applies to a model, and `run`, a generator of findings. `run` gets a
`Context`: the subject, the options, seeds, progress, the time left, and makers of figures and claims.

    def run(context):
        scores = ...                                                    # [prompt, head]
        chosen, measured = context.halves(len(scores))
        head = int(scores[chosen].mean(0).argmax())                     # chosen on one half,
        seed = context.seed_for("interval")
        estimate = bootstrap_interval(scores[measured, head], seed=seed)    # measured on the other
        yield context.claim("head", f"Head {head} ...", estimate=estimate, controls=[...], p_value=..., ...)

An exam can mislead by choosing and measuring on the same data, or by a control that is too easy to beat; both stand in
the record, so that a reader can see it. An exam writes nothing and prints nothing: the runner records what it yields.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tomoscope.errors import ProtocolError, nearest
from tomoscope.findings.control import stable_seed
from tomoscope.findings.figures import Figure
from tomoscope.findings.finding import Control, DataNote, Estimate, FigureRef, Finding
from tomoscope.findings.statistics import split_half
from tomoscope.findings.treatment import Treatment
from tomoscope.findings.verdict import Rule, judge

if TYPE_CHECKING:
    from tomoscope.exams.calibration.truth import Truth
    from tomoscope.findings.calibration import CalibrationTable

Item = TypeVar("Item")

NOTHING_CHOSEN = DataNote(name="nothing was chosen", description="The claim was declared before any data were seen.")


class Options(BaseModel):
    """The base of an exam's options: every field has a default, a description, and bounds where it needs them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _always(subject: Any) -> str:
    return ""


@dataclass(frozen=True)
class Exam:
    """What to examine, and by which rule the answer counts."""

    name: str
    """`folder.what`: "observe.logit_lens"."""
    title: str
    """Three to six words, for headings."""
    question: str
    """What it asks, one plain sentence with a question mark."""
    run: Callable[[Context], Iterator[Finding]]
    """Yields findings made by `context.claim`."""
    rule: Rule | Mapping[str, Rule]
    """The rule of its verdicts, or several by name for several sorts of claims."""
    options: type[Options] = Options
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options by protocol preset ("quick", "deep"), where they differ from the defaults."""
    applies: Callable[[Any], str] = _always
    """Why the exam cannot be run on this subject; "" where it can."""
    method: str = ""
    """How the numbers are reached, in two or three sentences; the default of each finding's own."""
    truth: Truth | None = None
    """How a phantom's card decides the claims, for an exam of one's own (`tomoscope.exams.calibration`)."""
    calibration: CalibrationTable | None = None
    """What `calibrate` found of it, for an exam of one's own; None takes what ships with tomoscope."""
    cost: float = 1.0
    """Expected work relative to other exams, for the time left."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", self.name):
            raise ProtocolError(
                f"{self.name!r} cannot name an exam.", remedy="Use lower-case words joined by '.' and '_'."
            )

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules by name; a single rule has the name ""."""
        return {"": self.rule} if isinstance(self.rule, Rule) else dict(self.rule)

    @property
    def signature(self) -> str:
        """Hash of the rules and the options with their defaults: a calibration of another signature is stale."""
        rules = {name: rule.model_dump(mode="json") for name, rule in self.rules.items()}
        value = {"name": self.name, "rules": rules, "options": self.options().model_dump(mode="json")}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def configure(self, options: Mapping[str, Any], *, where: str = "") -> Options:
        """The options with these values changed. Raises ProtocolError for an unknown name or an unfit value."""
        place = f" in {where}" if where else ""
        known = self.options.model_fields
        for key in options:
            if key not in known:
                listed = f"Its options are {', '.join(known)}." if known else "It has no options."
                raise ProtocolError(
                    f"The exam {self.name!r} has no option {key!r}{place}.",
                    remedy=f"{nearest(key, known)} {listed}".strip(),
                )
        try:
            return self.options.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ProtocolError(
                f"The option {key!r} of the exam {self.name!r} is {first['input']!r}{place}: {first['msg']}.",
                remedy=known[key].description or "" if key in known else "",
            ) from error


Report = Callable[[float, float | None, str], None]


def _unheard(done: float, total: float | None, what: str) -> None:
    return None


@dataclass
class Context:
    """What an exam is given, and where it puts its figures. One context serves one run of one exam."""

    subject: Any
    exam: Exam
    options: Any = None
    """An instance of the exam's options model; the defaults where not given."""
    scan_seed: int = 0
    reproduce: str = ""
    """The command that recomputes this exam alone."""
    deadline: float | None = None
    """`time.monotonic()` by which the budget is spent; None without budget."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What exams of one scan of one subject keep for each other (tasks already made and scored). Nothing in it may
    depend on which exam put it there: an exam run alone finds the same."""
    report: Report = _unheard
    """Called with (units done, total or None, what) as the work goes on."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    logged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options is None:
            self.options = self.exam.options()
        self._figures: set[str] = set()
        self._claims: set[str] = set()

    # -- seeds --------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """The exam's own seed: it follows from the scan's seed and the exam's name, not from what ran before."""
        return self.seed_for("")

    def seed_for(self, purpose: str) -> int:
        """A seed for one purpose ("interval", "control"), so that no two draws of an exam share their numbers."""
        return stable_seed(self.scan_seed, self.exam.name, purpose)

    def rng(self, purpose: str = "") -> np.random.Generator:
        """A fresh generator for one purpose; asked twice, it starts again."""
        return np.random.default_rng(self.seed_for(purpose))

    def halves(self, items: int | Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint halves of the items (a number, or a key each): choose on the first, measure on the second."""
        return split_half(items, seed=self.seed_for("halves"))

    # -- the work under way -------------------------------------------------------------------------------------

    def progress(self, done: float, total: float | None = None, what: str = "") -> None:
        """Say how far the work is, in any unit."""
        self.report(done, total, what)

    def track(self, items: Iterable[Item], what: str = "", *, total: int | None = None) -> Iterator[Item]:
        """Iterate and report progress; `total` defaults to the length of the items."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        self.report(0, total, what)
        for done, item in enumerate(items, start=1):
            yield item
            self.report(done, total, what)

    def remaining(self) -> float | None:
        """Seconds of the budget that are left (0 when spent); None without budget."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def log(self, line: str) -> None:
        """Keep a remark with the exam's record (prompts left out, a fallback taken)."""
        self.logged.append(line)

    # -- what it found ------------------------------------------------------------------------------------------

    def figure(self, name: str, figure: Figure) -> FigureRef:
        """Keep a figure's arrays (or table) for the ledger and give the reference for `claim(figures=[...])`."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,60}", name) or name in self._figures:
            why = "is taken" if name in self._figures else "is not lower-case letters, digits and '_'"
            raise ProtocolError(
                f"The figure name {name!r} of the exam {self.exam.name!r} {why}.", remedy="Choose another."
            )
        self._figures.add(name)
        places = {part: f"{name}.{part}" for part in figure.arrays}
        self.arrays |= {places[part]: np.asarray(array) for part, array in figure.arrays.items()}
        if figure.columns:
            self.tables[name] = figure.columns
        return FigureRef.model_validate(
            {
                "name": name, "exam": self.exam.name, "kind": figure.kind, "title": figure.title,
                "caption": figure.caption, "arrays": places, "labels": dict(figure.labels), "axes": dict(figure.axes),
                "scale": figure.scale, "center": figure.center, "marks": figure.marks,
                "references": dict(figure.references), "table": name if figure.columns else "", "text": figure.text,
            }
        )  # fmt: skip

    def claim(
        self,
        key: str,
        claim: str,
        *,
        estimate: Estimate,
        measured_on: DataNote,
        chosen_on: DataNote = NOTHING_CHOSEN,
        controls: Sequence[Control] = (),
        p_value: float | None = None,
        test: str = "",
        rule: str = "",
        sites: Sequence[str] = (),
        positions: str = "",
        figures: Sequence[FigureRef] = (),
        treatments: Sequence[Treatment] = (),
        method: str = "",
    ) -> Finding:
        """A finding with the verdict of the exam's rule (of the one named `rule`, where there are several).

        The verdict here is by the raw p-value; the runner corrects it for all claims of the scan when that has ended.
        Raises ProtocolError for a key used twice and a rule that was not declared.
        """
        if key in self._claims:
            raise ProtocolError(f"The exam {self.exam.name!r} made two claims {key!r}.", remedy="Give each its key.")
        self._claims.add(key)
        rules = self.exam.rules
        if rule not in rules:
            raise ProtocolError(
                f"The exam {self.exam.name!r} declared no rule {rule!r}.", remedy=f"Declared: {', '.join(rules)}."
            )
        from tomoscope.exams.calibration.lookup import calibration_of

        verdict, reason = judge(rules[rule], estimate, controls, p_value=p_value)
        return Finding(
            id=f"{self.exam.name}/{key}", exam=self.exam.name, claim=claim, sites=tuple(sites), positions=positions,
            estimate=estimate, controls=tuple(controls), p_value=p_value, test=test, chosen_on=chosen_on,
            measured_on=measured_on, rule=rules[rule].sentence(), criterion=rules[rule], verdict=verdict, reason=reason,
            method=method or self.exam.method, figures=tuple(figures), treatments=tuple(treatments),
            reproduce=self.reproduce, seed=self.scan_seed, calibration=calibration_of(self.exam, key, self.options),
        )  # fmt: skip

    def not_measured(self, key: str, claim: str, why: str) -> Finding:
        """A claim that could not be measured, and why."""
        nothing = DataNote(name="nothing")
        rule = next(iter(self.exam.rules))
        return self.claim(key, claim, estimate=Estimate.unknown(why), measured_on=nothing, chosen_on=nothing, rule=rule)


def examine(
    exam: Exam, subject: Any, *, options: Mapping[str, Any] | None = None, seed: int = 0, context: Context | None = None
) -> list[Finding]:
    """Run one exam by itself, without a ledger: for tests, notebooks and calibration.

    An exam that does not apply gives one finding, "not measured", with the reason. Give a `context` to keep its arrays.
    """
    context = context or Context(subject, exam, options=exam.configure(options or {}), scan_seed=seed)
    why = exam.applies(subject)
    return [context.not_measured("applies", exam.title, why)] if why else list(exam.run(context))
