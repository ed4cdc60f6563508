"""The report's sections: an exam with its question, and a finding with all its evidence."""

from __future__ import annotations

from collections.abc import Sequence

from tomoscope.findings.calibration import Calibration
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
    quiet = [one for one in findings if one.verdict == "not measured" and not one.figures and not one.estimate.n]
    causes, silent = by_cause(quiet), {one.id for one in quiet}
    for finding in findings:
        if finding.id in silent:
            together = causes.pop(finding.reason, None)
            if together is not None:
                parts.append(quiet_block(together, question=record.question))
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
    head = element("div", badge(finding.verdict) + _calibration_tag(finding.calibration), class_="verdict") + element(
        "h3", element("a", escape(finding.claim), href=f"#{anchor(finding.id)}")
    )
    reason = element("p", escape(finding.reason), class_="reason") + _calibration_line(finding.calibration)
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


def by_cause(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings by their reason, in order: what one cause kept from being measured is told once."""
    causes: dict[str, list[Finding]] = {}
    for finding in findings:
        causes.setdefault(finding.reason, []).append(finding)
    return causes


def quiet_line(findings: Sequence[Finding]) -> str:
    """What one cause kept from being measured, in the summary: a claim with the reason, or a reason with its claims."""
    reason, first = escape(findings[0].reason), findings[0]
    if len(findings) == 1:
        words = element("span", escape(first.claim), class_="claim") + element("span", reason, class_="meta")
        link = element("a", element("span", words, class_="words"), href=f"#{anchor(first.id)}")
        return element("li", link, class_="quiet-line")
    exams = len({finding.exam for finding in findings})
    count = f"{len(findings)} claims{f' of {exams} exams' if exams > 1 else ''}"
    claims = "".join(
        element("li", element("a", escape(finding.claim), href=f"#{anchor(finding.id)}")) for finding in findings
    )
    head = element("span", reason, class_="claim") + element("span", count, class_="meta")
    return element(
        "li", element("details", element("summary", head) + element("ul", claims)), class_="quiet-line cause"
    )


def quiet_block(findings: Sequence[Finding], *, question: str) -> str:
    """The same in an exam's section, where the reason suffices for a claim that is the exam's own question."""
    reason, first = element("span", escape(findings[0].reason), class_="meta"), findings[0]
    if len(findings) == 1:
        claim = "" if first.claim == question else element("span", escape(first.claim), class_="claim")
        return element(
            "div", badge(first.verdict) + claim + reason, class_="absent v-not-measured", id=anchor(first.id)
        )
    claims = "".join(element("li", escape(finding.claim), id=anchor(finding.id)) for finding in findings)
    body = badge(first.verdict) + reason + element("ul", claims, class_="claims")
    return element("div", body, class_="absent v-not-measured")


def command(text: str) -> str:
    """A command to copy."""
    if not text:
        return ""
    return element(
        "div",
        element("code", escape(text)) + '<button type="button" class="copy" hidden>Copy</button>',
        class_="command",
    )


def _calibration_tag(known: Calibration) -> str:
    """One word on how far the exam can be believed."""
    word = "calibrated badly" if known.status == "calibrated" and known.doubtful else known.status
    return element("span", word, class_=f"tag{' doubtful' if known.doubtful else ''}", title=known.note)


def _calibration_line(known: Calibration) -> str:
    """How often the exam was right on models whose answer is known."""
    if known.row is None:
        why = known.note or "never run on phantoms"
        said = f"Uncalibrated: {why}, so how often it misses or invents an effect is not known."
        return element("p", escape(said), class_="calibration")
    text = str(known)
    doubtful = " doubtful" if known.doubtful else ""
    return element("p", escape(f"{text[:1].upper()}{text[1:]}."), class_=f"calibration{doubtful}")


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
