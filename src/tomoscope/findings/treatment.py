"""A treatment: an edit that could mend what was found, its effect, and what else it changed.

The edit is stored as text (edits are values and print as the expression that makes them), so a record needs no torch.
A treatment misleads when its side effects were not looked for: `side_effects` names each measured one, and an empty
tuple means that none was measured, not that there is none.
"""

from __future__ import annotations

from typing import Literal

from tomoscope.findings.record import Record


class SideEffect(Record):
    """Something else that the treatment changed (or was shown not to change)."""

    name: str
    """What was looked at: "loss on held-out text"."""
    before: float | None
    after: float | None
    unit: str = ""
    missing: str | None = None
    """Why a number is not known."""


class Treatment(Record):
    """An edit, proposed or measured."""

    name: str
    """Three or four words: "ablate head 5.1"."""
    edit: str
    """The expression of the edit: `zero("layer.5.attn.z[head=1]")`."""
    status: Literal["proposed", "measured"] = "proposed"
    effect: str = ""
    """What it did to what was found, with numbers and interval; "" while only proposed."""
    side_effects: tuple[SideEffect, ...] = ()
