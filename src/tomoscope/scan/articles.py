"""The report's sections: an exam with its question, and a finding with all its evidence."""

from __future__ import annotations

from tomoscope.findings.estimate import format_number
from tomoscope.findings.finding import DataNote, Finding
from tomoscope.findings.ledger import Ledger
from tomoscope.findings.manifest import ExamRecord
from tomoscope.scan import figures
from tomoscope.scan.charts import css_name, evidence
from tomoscope.scan.markup import anchor, duration, element, escape

GLYPHS = {"confirmed": "●", "refuted": "✕", "inconclusive": "◐", "not measured": "○"}


def badge(verdict: str) -> str:
    """A verdict as a coloured word with its sign (never by colour alone)."""
    return element(
        "span", f'<i aria-hidden="true">{GLYPHS[verdict]}</i> {verdict}', class_=f"badge {css_name(verdict)}"
    )


def exam_section(ledger: Ledger, record: ExamRecord, findings: list[Finding]) -> str:
    """An exam: its question, its findings with their pictures, how long it took and what it remarked."""
    arrays = ledger.arrays(record.exam)
    tables = {key.split("/", 1)[1]: columns for key, columns in ledger.tables(record.exam).items()}
    drawn: dict[str, str] = {}
    parts = []
    for finding in findings:
        if finding.verdict == "not measured" and not finding.figures and not finding.estimate.n:
            parts.append(quiet_line(finding, question=record.question))
            continue
        pictures = []
        for figure in finding.figures:
            if figure.name in drawn:
                again = element("a", f"“{escape(figure.title.rstrip('.'))}” above", href=f"#{drawn[figure.name]}")
                pictures.append(element("p", f"Its picture is {again}.", class_="note"))
            else:
                place = f"g-{css_name(record.exam)}-{figure.name}"
                drawn[figure.name] = place
                pictures.append(element("div", figures.draw(figure, arrays, tables), id=place))
        parts.append(article(finding, "".join(pictures)))
    head = (
        element("h2", escape(record.title or record.exam))
        + element("p", escape(record.question), class_="question")
        + element("p", _facts(record), class_="timing")
    )
    log = ""
    if record.log:
        items = "".join(element("li", escape(line)) for line in record.log)
        log = element("details", element("summary", "Remarks of the exam") + element("ul", items), class_="log")
    return element("section", head + "".join(parts) + log, id=css_name(record.exam), class_="exam")


def _facts(record: ExamRecord) -> str:
    memory = f" · peak memory {record.peak_memory_bytes / 1e9:.2f} GB" if record.peak_memory_bytes else ""
    options = ", ".join(f"{key} {value}" for key, value in record.options.items())
    said = f" · {escape(options)}" if options else ""
    return f"<code>{escape(record.exam)}</code> · {duration(record.seconds)}{memory}{said}"


def article(finding: Finding, pictures: str) -> str:
    """A finding: claim, verdict, picture, the comparison behind the verdict, and where each part comes from."""
    head = element("div", badge(finding.verdict) + _calibration(finding), class_="verdict") + element(
        "h3", element("a", escape(finding.claim), href=f"#{anchor(finding.id)}")
    )
    reason = element("p", escape(finding.reason), class_="reason")
    rows = [
        ("Where", _where(finding)),
        ("Chosen on", _data(finding.chosen_on)),
        ("Measured on", _data(finding.measured_on)),
        ("Estimate", escape(f"{finding.estimate}; n = {finding.estimate.n:,}. {finding.estimate.method}")),
    ]
    rows += [
        (f"Control: {escape(item.name)}", escape(f"{item.estimate}. {item.description}".strip()))
        for item in finding.controls
    ]
    rows += [
        ("p-value", _p_value(finding)),
        ("Rule", escape(finding.rule)),
        ("How", escape(finding.method)),
    ]
    rows += [
        (
            f"Treatment: {escape(item.name)}",
            f"<code>{escape(item.edit)}</code> ({item.status}) {escape(item.effect)}"
            + "".join(_side_effect(effect) for effect in item.side_effects),
        )
        for item in finding.treatments
    ]
    grid = "".join(element("dt", name) + element("dd", value) for name, value in rows if value)
    body = (
        head + reason + pictures + f'<div class="scroll">{evidence(finding)}</div>'
        + element("dl", grid, class_="details") + command(finding.reproduce)
    )  # fmt: skip
    return element("article", body, id=anchor(finding.id), class_=f"v-{css_name(finding.verdict)}")


def quiet_line(finding: Finding, *, question: str | None = None) -> str:
    """A finding that was not measured, and the reason, without noise.

    In the summary (no `question`) the claim links to its section; in its section the reason suffices where the claim is
    the exam's own question.
    """
    claim = element("span", escape(finding.claim), class_="claim")
    reason = element("span", escape(finding.reason), class_="meta")
    if question is None:
        link = element("a", element("span", claim + reason, class_="words"), href=f"#{anchor(finding.id)}")
        return element("li", link, class_="quiet-line")
    words = badge(finding.verdict) + ("" if finding.claim == question else claim) + reason
    return element("div", words, class_="absent v-not-measured", id=anchor(finding.id))


def command(text: str) -> str:
    """A command to copy."""
    if not text:
        return ""
    return element(
        "div",
        element("code", escape(text)) + '<button type="button" class="copy" hidden>Copy</button>',
        class_="command",
    )


def _calibration(finding: Finding) -> str:
    if finding.calibration == "uncalibrated":
        why = "This exam has not been run on phantoms yet, so its sensitivity and specificity are not known."
        return element("span", "uncalibrated", class_="tag", title=why)
    return element("span", escape(finding.calibration), class_="tag")


def _where(finding: Finding) -> str:
    sites = ", ".join(f"<code>{escape(site)}</code>" for site in finding.sites[:24])
    if len(finding.sites) > 24:
        sites += f" and {len(finding.sites) - 24} more"
    if finding.positions:
        sites += f"{'; ' if sites else ''}positions: {escape(finding.positions)}"
    return sites


def _data(note: DataNote) -> str:
    n = f", n = {note.n:,}" if note.n is not None else ""
    tail = f". {note.description}" if note.description else ""
    digest = f" <code>{escape(note.hash[:12])}</code>" if note.hash else ""
    return escape(f"{note.name}{n}{tail}") + digest


def _p_value(finding: Finding) -> str:
    if finding.p_value is None:
        return ""
    after = (
        f"{format_number(finding.p_adjusted, digits=2)} after correction for all claims of the scan"
        if finding.p_adjusted is not None
        else "not corrected yet"
    )
    tail = f" {finding.test[0].upper()}{finding.test[1:].rstrip('.')}." if finding.test else ""
    return escape(f"{format_number(finding.p_value, digits=2)}; {after}.{tail}")


def _side_effect(effect) -> str:
    if effect.before is None or effect.after is None:
        return f"; {escape(effect.name)}: not measured ({escape(effect.missing or 'no reason given')})"
    before, after = format_number(effect.before), format_number(effect.after)
    return f"; {escape(effect.name)}: {before} before, {after} after {escape(effect.unit)}"
