"""The records of what was found: a claim, its estimate, the control that could have refuted it, and the verdict.

Records are frozen pydantic values: they compare, print and go into the ledger as JSON. A number that is not known is
`None` together with the reason (`Estimate.unknown("...")`); it is never 0, and never NaN.

A record can mislead when an estimate was measured on the data that the site was chosen on: `chosen_on` and
`measured_on` are therefore two fields of every finding, and the report shows both.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tomoscope.findings.calibration import Calibration
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.record import Record
from tomoscope.findings.treatment import Treatment
from tomoscope.findings.verdict import Rule, Verdict

FigureKind = Literal["heatmap", "curve", "bars", "attention", "tokens", "graph", "table", "text"]


class Control(Record):
    """What the number is by chance, or under the dumb baseline."""

    name: str
    """Two or three words: "random heads", "shuffled labels"."""
    estimate: Estimate
    description: str = ""
    """How the control was made, so that a reader can judge whether it is a fair one."""


class DataNote(Record):
    """The data that something was chosen or measured on."""

    name: str
    """Task or corpus, and which half: "indirect object identification, half A"."""
    n: int | None = None
    """Number of items; None where it does not count in items (weights alone)."""
    description: str = ""
    hash: str = ""
    """SHA-256 of the items, where they were hashed."""


class FigureRef(Record):
    """A picture's data in the ledger: which arrays of the exam play which part, and the words around them."""

    name: str
    """Unique inside its exam."""
    exam: str
    kind: FigureKind
    title: str
    caption: str = ""
    arrays: dict[str, str] = Field(default_factory=dict)
    """Part ("values", "low", "high", "x" ...) to the name of an array in the exam's safetensors file."""
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Axis ("row", "column", "series", "bar", "head", "token") to the labels along it."""
    axes: dict[str, str] = Field(default_factory=dict)
    """Axis ("x", "y", "value") to what it shows, with its unit."""
    scale: Literal["sequential", "diverging"] = "sequential"
    center: float = 0.0
    """The value in the middle of a diverging scale."""
    marks: tuple[tuple[int, int], ...] = ()
    """Cells (row, column) or bars (index, 0) that the claim is about; drawn with an outline."""
    references: dict[str, float] = Field(default_factory=dict)
    """Named horizontal lines: the control's value, chance."""
    table: str = ""
    """For a table: the name of the Parquet table in the exam's folder."""
    text: str = ""
    """For a text: the text itself."""


class Finding(Record):
    """One claim about what a part of the model does, with its evidence."""

    id: str
    """`exam/key`, the same for the same command and seed."""
    exam: str
    claim: str
    """One plain sentence that could be false."""
    sites: tuple[str, ...] = ()
    """Where: site names with their selections, `layer.6.attn.z[head=3]`."""
    positions: str = ""
    """At which tokens: "last", "the subject's last token", "all"."""
    estimate: Estimate
    controls: tuple[Control, ...] = ()
    p_value: float | None = Field(default=None, ge=0, le=1)
    """As computed, and never overwritten; None where the rule needs no test."""
    p_adjusted: float | None = Field(default=None, ge=0, le=1)
    """After correction for the number of claims of the scan; None until the scan has finished."""
    test: str = ""
    """Which test gave the p-value, against which null hypothesis."""
    chosen_on: DataNote
    measured_on: DataNote
    rule: str
    """The sentence of the rule, declared before the run."""
    criterion: Rule | None = None
    """The rule itself, so that the verdict can be recomputed from the record."""
    verdict: Verdict
    reason: str
    """Why the verdict is what it is, with the numbers."""
    method: str = ""
    """How the number was reached, in two or three sentences."""
    figures: tuple[FigureRef, ...] = ()
    treatments: tuple[Treatment, ...] = ()
    reproduce: str = ""
    """The one command that recomputes just this finding."""
    seed: int = 0
    calibration: Calibration = Calibration()
    """What is known of the exam's sensitivity and specificity on phantoms."""
