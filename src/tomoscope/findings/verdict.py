"""Rules, declared before the run, and the verdicts that follow from them.

A rule compares an estimate with its reference (the strongest control, or a fixed number) in a predicted direction:

    confirmed       the whole interval lies beyond the reference, the effect is at least `minimum`, and p < `alpha`
    refuted         the whole interval lies short of reference + minimum: an effect worth claiming is excluded
    inconclusive    anything else: the data do not decide
    not measured    there is no number, or no control to compare it with

It can mislead when the minimum is 0: then a tiny effect can be confirmed on enough data. State a minimum.

Steps: `Rule.sentence` (goes into the record before the run), `judge` (one claim), `correct` (all p-values of a scan).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tomoscope.findings.corrections import benjamini_hochberg, holm
from tomoscope.findings.record import Record

if TYPE_CHECKING:
    from tomoscope.findings.finding import Control, Estimate, Finding

Verdict = Literal["confirmed", "refuted", "inconclusive", "not measured"]
Correction = Literal["holm", "benjamini-hochberg", "none"]

CORRECTION_NAMES = {"holm": "Holm", "benjamini-hochberg": "Benjamini-Hochberg", "none": "no correction"}


class Rule(Record):
    """When a claim counts as confirmed or refuted."""

    direction: Literal["greater", "less", "different"] = "greater"
    """On which side of the reference the claim predicts the estimate."""
    minimum: float = Field(default=0.0, ge=0)
    """The smallest distance from the reference worth claiming, in the estimate's unit."""
    alpha: float | None = Field(default=0.05, gt=0, lt=1)
    """The corrected p-value must lie below it; None where the rule needs no test, only the interval."""
    reference: float | None = None
    """A fixed number to compare with; None compares with the control nearest to refuting the claim."""
    note: str = ""
    """A further sentence, where the rule needs one."""

    def sentence(self) -> str:
        """The rule in words, as it goes into the record and the report."""
        against = "every control" if self.reference is None else f"{self.reference:g}"
        side = {"greater": "above", "less": "below", "different": "to one side of"}[self.direction]
        parts = [f"the whole 95 % interval lies {side} {against}"]
        if self.minimum:
            parts.append(f"the distance is at least {self.minimum:g}")
        if self.alpha is not None:
            parts.append(f"the corrected p-value is below {self.alpha:g}")
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        if self.direction != "different":
            refuted = f"refuted if the interval excludes an effect of {self.minimum:g} or more; otherwise inconclusive."
        elif self.minimum:
            refuted = f"refuted if the whole interval lies within {self.minimum:g} of it; otherwise inconclusive."
        else:
            refuted = "otherwise inconclusive."
        return f"Confirmed if {listed}; {refuted}{' ' + self.note if self.note else ''}"


def judge(
    rule: Rule, estimate: Estimate, controls: Sequence[Control] = (), *, p_value: float | None = None
) -> tuple[Verdict, str]:
    """Apply a rule to one claim; `p_value` is the corrected one where the scan has finished.

    Returns the verdict and its reason, with the numbers in it.
    """
    from tomoscope.findings.estimate import format_number as number

    if estimate.value is None:
        return "not measured", estimate.missing or "no estimate"
    reference, name, why = _reference(rule, estimate.value, controls)
    if reference is None:
        return "not measured", why
    if estimate.low is not None and estimate.high is not None:
        low, high = estimate.low, estimate.high
        said = f"{number(estimate.value)} ({number(low)} to {number(high)})"
    elif estimate.method == "exact":
        low = high = estimate.value
        said = f"{number(estimate.value)} (exact)"
    else:
        return "inconclusive", f"{number(estimate.value)} has no interval ({estimate.method}), and the rule needs one."
    effect = estimate.value - reference
    beyond = {"greater": low > reference, "less": high < reference, "different": low > reference or high < reference}
    size = {"greater": effect, "less": -effect, "different": abs(effect)}[rule.direction]
    against = f"{name} ({number(reference)})"
    side = "above" if effect > 0 else "below"
    if _excluded(rule, low, high, reference):
        predicted = {"greater": "above", "less": "below", "different": "away from"}[rule.direction]
        effect_text = f"an effect of {rule.minimum:g} or more {predicted} {against}" if rule.minimum else ""
        return "refuted", f"{said} excludes {effect_text or f'any effect {predicted} {against}'}."
    if not beyond[rule.direction]:
        return "inconclusive", f"{said} does not exclude {against}."
    if size < rule.minimum:
        short = f"the distance of {number(size)} is short of the declared minimum of {rule.minimum:g}"
        return "inconclusive", f"{said} lies {side} {against}, but {short}."
    if rule.alpha is None:
        return "confirmed", f"{said} lies {side} {against}."
    if p_value is None:
        return "inconclusive", f"{said} lies {side} {against}, but no p-value was measured."
    if p_value >= rule.alpha:
        said_p = f"p = {number(p_value, digits=2)} is not below {rule.alpha:g}"
        return "inconclusive", f"{said} lies {side} {against}, but {said_p}."
    return "confirmed", f"{said} lies {side} {against}, p = {number(p_value, digits=2)}."


def _excluded(rule: Rule, low: float, high: float, reference: float) -> bool:
    """Whether the interval excludes an effect worth claiming."""
    if rule.direction == "greater":
        return high < reference + rule.minimum
    if rule.direction == "less":
        return low > reference - rule.minimum
    return rule.minimum > 0 and low > reference - rule.minimum and high < reference + rule.minimum


def _reference(rule: Rule, value: float, controls: Sequence[Control]) -> tuple[float | None, str, str]:
    """The number to compare with, its name, and why there is none."""
    if rule.reference is not None:
        return rule.reference, "the fixed reference", ""
    known = [(control.estimate.value, control.name) for control in controls if control.estimate.value is not None]
    if not known:
        missing = [f"{control.name}: {control.estimate.missing}" for control in controls]
        return None, "", "no control was measured" + (f" ({'; '.join(missing)})" if missing else "")
    if rule.direction == "greater":
        best = max(known)
    elif rule.direction == "less":
        best = min(known)
    else:
        best = min(known, key=lambda pair: abs(pair[0] - value))
    return best[0], best[1], ""


def correct(findings: Sequence[Finding], *, method: Correction = "holm") -> list[Finding]:
    """Correct the p-values of all claims of a scan for their number, and judge each again.

    Only findings with a p-value count. The raw p stays as it is; `p_adjusted`, `verdict` and `reason` are new. The
    findings come back in their order; those without p-value unchanged.
    """
    tested = [finding for finding in findings if finding.p_value is not None]
    raw = [finding.p_value for finding in tested if finding.p_value is not None]
    adjusted = {"holm": holm, "benjamini-hochberg": benjamini_hochberg, "none": list}[method](raw)
    new = {}
    for finding, p_adjusted in zip(tested, adjusted, strict=True):
        changes: dict[str, object] = {"p_adjusted": float(p_adjusted)}
        if finding.criterion is not None and finding.verdict != "not measured":
            verdict, reason = judge(finding.criterion, finding.estimate, finding.controls, p_value=float(p_adjusted))
            changes |= {"verdict": verdict, "reason": reason}
        new[finding.id] = finding.model_copy(update=changes)
    return [new.get(finding.id, finding) for finding in findings]
