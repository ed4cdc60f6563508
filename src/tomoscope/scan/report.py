"""report.html: one file that a person wants to read, made from the ledger alone.

It asks the network for nothing (a content security policy forbids it), needs no script to be read (a script of a few
lines adds copying and filtering), and treats every string of the record as hostile. It can mislead only as far as the
record does: the control, the data of choice and of measurement, the rule and the reason stand beside each number.

Steps: the header (what, when, how), the findings by verdict, a section per exam, the appendix.
"""

from __future__ import annotations

from pathlib import Path

from tomoscope.findings.estimate import format_number
from tomoscope.findings.files import write_bytes
from tomoscope.findings.finding import Finding
from tomoscope.findings.ledger import Ledger
from tomoscope.findings.manifest import ExamRecord, Manifest
from tomoscope.scan.appendix import appendix
from tomoscope.scan.articles import badge, by_cause, exam_section, quiet_line
from tomoscope.scan.charts import css_name, glance
from tomoscope.scan.colour import style_sheet
from tomoscope.scan.markup import anchor, duration, element, escape
from tomoscope.scan.page import asset, document

VERDICTS = ("confirmed", "refuted", "inconclusive", "not measured")


def write_report(ledger: Ledger, path: str | Path | None = None) -> Path:
    """Write the run's report (report.html in its folder) atomically, and return where it is.

    Raises LedgerError where it cannot be written.
    """
    place = ledger.folder / "report.html" if path is None else Path(path)
    write_bytes(place, render_report(ledger).encode("utf-8", "replace"))
    return place


def render_report(ledger: Ledger) -> str:
    """The report as HTML text."""
    exams = ledger.exams()
    findings = ledger.findings()
    by_exam = {name: [finding for finding in findings if finding.exam == name] for name in exams}
    title = f"{_short_name(ledger.manifest)} · tomoscope"
    sections = "".join(exam_section(ledger, exams[name], by_exam[name]) for name in exams)
    body = (
        '<a class="skip" href="#findings">To the findings</a>'
        + _contents(exams, by_exam)
        + element(
            "main", _header(ledger.manifest, exams, findings) + _summary(findings, exams) + sections + appendix(ledger)
        )
    )
    return document(title, body, style=asset("page.css") + style_sheet(), script=asset("page.js"))


def _short_name(manifest: Manifest) -> str:
    name = str(manifest.provenance.model.get("name", "a model"))
    return name.rstrip("/").rsplit("/", 1)[-1] or name


def _contents(exams: dict[str, ExamRecord], by_exam: dict[str, list[Finding]]) -> str:
    items = [element("li", '<a href="#findings">Findings</a>')]
    for name, record in exams.items():
        dots = "".join(element("i", class_=f"pip {css_name(finding.verdict)}") for finding in by_exam[name][:8])
        label = escape(record.title or name) + element("span", dots, class_="pips", aria_hidden="true")
        items.append(element("li", element("a", label, href=f"#{css_name(name)}")))
    items.append(element("li", '<a href="#record">The record</a>'))
    return element("nav", element("ol", "".join(items)), aria_label="Contents")


def _header(manifest: Manifest, exams: dict[str, ExamRecord], findings: list[Finding]) -> str:
    model = manifest.provenance.model
    protocol = manifest.protocol
    seconds = sum(record.seconds for record in exams.values())
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    listed = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    told = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + "".join(listed[-1:])
    claims = f"{len(findings)} claim{'' if len(findings) == 1 else 's'}"
    lede = (
        f"{len(exams)} exam{'' if len(exams) == 1 else 's'} of the <em>{escape(protocol.get('name', ''))}</em> "
        "protocol "
        f"put {claims} to the test: {told or 'none yet'}. "
        f"{escape(str(protocol.get('description', '')))}"
    )
    facts = [
        ("Scanned", escape(manifest.started.replace("T", " ").replace("+00:00", " UTC"))),
        ("Working time", duration(seconds)),
        ("Protocol", escape(f"{protocol.get('name', '')}, seed {manifest.seed}")),
        ("Correction", escape(manifest.correction or "none yet")),
    ]
    facts += _model_facts(model)
    grid = "".join(element("div", element("dt", name) + element("dd", value)) for name, value in facts if value)
    state = ""
    if manifest.status != "finished":
        word = "was interrupted" if manifest.status == "interrupted" else "has not finished"
        state = element(
            "p", f"This run {word}. What is here is whole, but p-values are not corrected yet, so verdicts may change. "
            "The same command goes on from here.", class_="state",
        )  # fmt: skip
    source = str(model.get("name", ""))
    path = element("p", escape(source), class_="source") if source != _short_name(manifest) else ""
    return element(
        "header",
        element("p", "tomoscope scan", class_="eyebrow") + element("h1", escape(_short_name(manifest))) + path
        + element("p", lede, class_="lede") + state + element("dl", grid, class_="facts"),
    )  # fmt: skip


def _model_facts(model: dict) -> list[tuple[str, str]]:
    """The facts that a reader wants first; all of them stand in the appendix."""
    facts = model.get("facts") or {}
    wanted = [
        ("Family", "family"), ("Layers", "n_layers"), ("Heads", "n_heads"), ("Width", "d_model"),
        ("Parameters", "n_parameters"),
    ]  # fmt: skip
    shown = []
    for label, key in wanted:
        value = facts.get(key)
        if value is not None:
            shown.append((label, f"{value:,}" if isinstance(value, int) else escape(value)))
    if "parity" in facts:
        parity = facts["parity"]
        if isinstance(parity, (int, float)):
            said = "bit-identical" if parity == 0 else f"within {format_number(float(parity))}"
            shown.append(("Logits while reading", f"{said} to the library’s own"))
        elif isinstance(parity, str):
            shown.append(("Parity", escape(parity)))
    return shown


def _summary(findings: list[Finding], exams: dict[str, ExamRecord]) -> str:
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    share = "".join(
        element("rect", element("title", f"{count} {verdict}"), x=round(1000 * before / len(findings), 1), y=0,
                width=max(1.0, 1000 * count / len(findings) - 4), height=10, class_=f"share {css_name(verdict)}")
        for verdict, count, before in zip(VERDICTS, counts.values(), _running(list(counts.values())), strict=True)
        if count
    )  # fmt: skip
    strip = (
        f'<svg class="strip" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-label="Findings by verdict">{share}</svg>'
        if findings
        else ""
    )
    buttons = "".join(
        element(
            "button", f"{badge(verdict)} {count}", type="button", data_verdict=css_name(verdict), aria_pressed="true"
        )
        for verdict, count in counts.items()
        if count
    )
    groups = []
    for verdict in VERDICTS:
        group = [finding for finding in findings if finding.verdict == verdict]
        if not group:
            continue
        if verdict == "not measured":
            lines = [quiet_line(together) for together in by_cause(group).values()]
        else:
            lines = [_line(item, exams) for item in group]
        heading = element("h3", f"{badge(verdict)} {_explained(verdict)}")
        groups.append(
            element(
                "div", heading + element("ul", "".join(lines), class_="lines"), class_=f"group v-{css_name(verdict)}"
            )
        )
    empty = "" if findings else element("p", "The run has no findings yet.", class_="quiet")
    return element(
        "section",
        element("h2", "Findings") + strip + element("div", buttons, class_="filter", hidden="hidden")
        + "".join(groups) + empty,
        id="findings",
    )  # fmt: skip


def _running(counts: list[int]) -> list[int]:
    return [sum(counts[:place]) for place in range(len(counts))]


def _explained(verdict: str) -> str:
    words = {
        "confirmed": "the evidence meets the rule that was declared before the run",
        "refuted": "an effect of the declared size is excluded",
        "inconclusive": "these data do not decide",
        "not measured": "and why not",
    }
    return element("small", words[verdict])


def _line(finding: Finding, exams: dict[str, ExamRecord]) -> str:
    record = exams.get(finding.exam)
    where = escape(record.title if record and record.title else finding.exam)
    number = escape(str(finding.estimate))
    row = finding.calibration.row
    doubts = "; ".join(row.concerns()) if row else ""
    doubt = f" · the exam {escape(doubts)}" if doubts else ""
    words = element("span", escape(finding.claim), class_="claim") + element(
        "span", f"{where} · {number}{doubt}", class_="meta"
    )
    return element(
        "li", element("a", element("span", words, class_="words") + glance(finding), href=f"#{anchor(finding.id)}")
    )
