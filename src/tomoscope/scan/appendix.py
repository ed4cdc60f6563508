"""The report's last part: the record behind it (versions, arguments, machine, exams) and a glossary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tomoscope.findings.calibration import Calibration, said_share
from tomoscope.findings.ledger import Ledger
from tomoscope.scan.markup import duration, element, escape

GLOSSARY = {
    "Estimate": "The measured number. Its 95 % interval comes from resampling the prompts (a bootstrap), or from a "
    "closed form where there is one: were the exam repeated on new prompts, such intervals would hold the true "
    "value in about 95 of 100 cases.",
    "Control": "The same number where the claim must be false: shuffled labels, a random direction of equal norm, a "
    "random set of heads of equal size, untrained weights.",
    "Verdict": "Confirmed, refuted or inconclusive, by the rule that stood in the record before the exam ran; “not "
    "measured” where there is no number, with the reason. A missing number is never counted as zero.",
    "Chosen on, measured on": "A part of the model that was picked for its score would look good on the data it was "
    "picked on. Where something was chosen, the number is measured on other data.",
    "p-value": "How often chance alone would give a number at least as extreme. The corrected value accounts for all "
    "claims of the scan (Holm: the chance of even one false confirmation stays below the stated level).",
    "Calibrated": "The exam was run on models whose answer is known (phantoms) and on their nulls (the same kind of "
    "model without the thing). Of the claims that are true it found the share given first (sensitivity); on those that "
    "are false it was silent as often as said (specificity); the ROC area is how often its evidence for a true claim "
    "is above that for a false one (1/2: by chance). Intervals count models, not claims. “Uncalibrated”: never tried, "
    "or no phantom can decide it. “Stale”: tried with another version of its rule or options.",
    "Site": "A named place in the model: <code>layer.6.resid_post</code> is the residual stream after block 6, "
    "<code>layer.6.attn.z[head=3]</code> what head 3 of block 6 reads by its attention, before the output projection.",
    "Residual stream": "The vector at each token that every block reads from and adds to.",
    "Logit difference": "The logit of the right answer minus that of the wrong one: 0 means undecided.",
    "Patching": "Running the model on one prompt while one site is given the value it had on another prompt: what the "
    "answer gains or loses is what that site carries. Denoising restores a corrupted prompt, noising breaks a clean "
    "one.",
    "Lens": "Reading a layer’s stream as if it were the last: what the model would say were it to stop there.",
    "Nat": "The unit of surprise with natural logarithms; 0.69 nats are one bit.",
}


def appendix(ledger: Ledger) -> str:
    """Provenance, arguments, exams and glossary."""
    manifest = ledger.manifest
    origin = manifest.provenance
    model = {key: value for key, value in origin.model.items() if key != "facts"} | (origin.model.get("facts") or {})
    memory = f"{origin.machine.memory_bytes / 1e9:.1f} GB" if origin.machine.memory_bytes else "not known"
    commit = f"{origin.code.commit[:12]}{' with changes' if origin.code.dirty else ''}" if origin.code.commit else ""
    run = [
        ("Folder", ledger.folder), ("Status", manifest.status), ("Command", origin.command), ("Seed", manifest.seed),
        ("Started", manifest.started), ("Finished", manifest.finished or "not yet"),
        ("Schema of the record", manifest.schema_version),
    ]  # fmt: skip
    machine = [
        ("Machine", f"{origin.machine.processor}, {origin.machine.cores} cores, {memory}"),
        ("Device", origin.machine.device), ("System", origin.machine.system), ("Python", origin.python),
        ("Code", commit), *origin.versions.items(),
    ]  # fmt: skip
    blocks = [
        _block("This run", run), _block("The model", model.items()), _block("Arguments given", origin.passed.items()),
        _block("Arguments left at their defaults", origin.defaulted.items()), _block("Data", origin.data.items()),
        _block("Machine and versions", machine),
    ]  # fmt: skip
    terms = "".join(element("dt", escape(term)) + element("dd", meaning) for term, meaning in GLOSSARY.items())
    return element(
        "section",
        element("h2", "The record") + _exams(ledger) + _calibrations(ledger)
        + element("div", "".join(blocks), class_="blocks")
        + element("h3", "Terms") + element("dl", terms, class_="glossary"),
        id="record", class_="appendix",
    )  # fmt: skip


def _block(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        element("tr", element("th", escape(name), scope="row") + element("td", escape(_said(value))))
        for name, value in rows
        if value not in ("", None) or title.startswith("Arguments")
    )
    return element("div", element("h3", title) + f'<table class="plain">{body}</table>', class_="block") if body else ""


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _calibrations(ledger: Ledger) -> str:
    """How far the exams of this run can be believed: the rows beside its findings, each once."""
    rows: dict[tuple[str, str], Calibration] = {}
    for finding in ledger.findings():
        known = finding.calibration
        if known.row is not None:
            rows.setdefault((known.row.exam, known.row.kind), known)
    if not rows:
        return ""
    heads = ("Exam", "Claims", "Finds", "Silent on nulls", "Right place", "ROC area", "Phantoms")
    head = "".join(element("th", name) for name in heads)
    body = "".join(element("tr", "".join(element("td", cell) for cell in _row(known))) for known in rows.values())
    table = f'<table class="exams"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return element("h3", "How far the exams can be believed") + element("div", table, class_="scroll")


def _row(known: Calibration) -> list[str]:
    row = known.row
    assert row is not None
    sources = ", ".join(f"{name} {count}" for name, count in row.sources.items())
    finds, silent = (
        f"{tally.right} of {tally.claims}; {said_share(share)}" if share.value is not None else said_share(share)
        for tally, share in ((row.planted, row.sensitivity), (row.nulls, row.specificity))
    )
    name = row.exam if known.status == "calibrated" else f"{row.exam} (stale)"
    cells = [name, row.kind or "all", finds, silent, said_share(row.located), said_share(row.area), sources]
    return [escape(cell) for cell in cells]


def _exams(ledger: Ledger) -> str:
    rows = []
    for name, record in ledger.exams().items():
        memory = f"{record.peak_memory_bytes / 1e9:.2f} GB" if record.peak_memory_bytes else "–"
        cells = [
            element("td", element("a", escape(name), href=f"#{name.replace(' ', '-')}")),
            element("td", escape(record.status if not record.error else f"{record.status}: {record.error}")),
            element("td", str(len(record.findings)), class_="num"),
            element("td", duration(record.seconds), class_="num"),
            element("td", memory, class_="num"),
        ]
        rows.append(element("tr", "".join(cells)))
    if not rows:
        return ""
    heads = ("Exam", "Status", "Findings", "Time", "Peak memory")
    head = "".join(element("th", name, class_="num" if place > 1 else "") for place, name in enumerate(heads))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="exams">{body}</table></div>'
