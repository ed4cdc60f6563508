from __future__ import annotations

import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.dummies import DummyFacts, DummySubject, make_exam
from tests.scan.example import example_calibration, example_run
from tomoscope.exams.registry import Registry
from tomoscope.findings import CalibrationTable, Control, DataNote, Estimate, Ledger, figures
from tomoscope.findings.figures import Figure
from tomoscope.findings.finding import FigureRef
from tomoscope.scan import figures as drawing
from tomoscope.scan import parse_protocol, plan, render_report, run_scan, write_report
from tomoscope.scan.charts import evidence, ticks
from tomoscope.scan.colour import LEVELS, MISSING, Scale, palette, png, shrink
from tomoscope.scan.markup import anchor, duration, escape, token_text, visible

HOSTILE = "<script>alert(1)</script></style></title>\"'><img src=x onerror=alert(1)>\x00\u202eevil\u2066\ud800&amp;"
VOID = {"meta", "wbr", "br"}


class Page(HTMLParser):
    """Elements, attributes and text of a page, with every element closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return example_run(tmp_path_factory.mktemp("runs") / "run", wide=True)


@pytest.fixture(scope="module")
def page(ledger):
    return render_report(ledger)


def test_every_finding_stands_in_the_page_with_its_evidence(ledger, page):
    parsed = Page(page)
    text = " ".join(" ".join(parsed.words).split())
    ids = {attributes.get("id") for _, attributes in parsed.tags}
    for finding in ledger.findings():
        assert finding.reason in text
        assert anchor(finding.id) in ids
        if finding.estimate.value is None:
            continue
        assert finding.claim in text
        assert finding.rule in text
        assert finding.reproduce in text
        assert finding.measured_on.name in text
        for control in finding.controls:
            assert str(control.estimate) in text
    assert "Holm over 6 claims" in text
    assert "gpt2-small" in text


def test_links_lead_somewhere_and_ids_are_unique(page):
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.tags:
        href = attributes.get("href")
        if href and not href.startswith("data:image/png;base64,"):
            assert href.startswith("#"), "nothing outside the file"
            assert href[1:] in ids


def test_the_page_asks_for_nothing_and_its_policy_forbids_it(page):
    parsed = Page(page)
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1


def test_a_wide_heatmap_is_a_picture_and_the_page_stays_small(page):
    assert page.count("data:image/png;base64,") == 2
    assert len(page) < 400_000


def test_how_far_an_exam_can_be_believed_stands_beside_its_findings(ledger, page):
    text = " ".join(" ".join(Page(page).words).split())
    said = "finds 8 of 20 planted [0.22, 0.61] (3 not measured), silent on 59 of 60 nulls [0.91, 1.00]; ROC area 0.81"
    assert f"Stale (another version of its rule or options): {said} [0.66, 0.90]. It misses more than it finds." in text
    patching = [finding for finding in ledger.findings() if finding.exam == "circuits.patching"]
    assert text.count(said) == len(patching)
    assert text.count("· the exam misses more than it finds") == len(patching)
    assert "Uncalibrated: never run on phantoms, so how often it misses or invents an effect is not known." in text
    assert "How far the exams can be believed" in text
    assert "circuits.patching (stale)" in text
    assert "induction_gpt2 40, untrained 40" in text
    assert page.count('class="tag doubtful"') == len(patching)


def test_one_cause_is_told_once_with_all_it_kept_from_being_measured(tmp_path):
    def run(context):
        for key in ("a", "b", "c"):
            yield context.not_measured(
                key, f"Claim {key}.", "the tokenizer has too few names" if key != "c" else "other"
            )

    exams = Registry(modules=())
    for name in ("dummy.one", "dummy.two"):
        exams.register(make_exam(name, run=run, question=f"{name}?"))
    protocol = parse_protocol('name = "t"\n[[exam]]\nname = "*"', where="t")
    ledger = run_scan(DummySubject(), protocol, plan(protocol, exams=exams), out=tmp_path / "run")
    page = render_report(ledger)
    parsed = Page(page)
    summary, sections = page.split('id="findings"')[1].split("</section>", 1)
    assert summary.count("the tokenizer has too few names") == 1
    assert "4 claims of 2 exams" in summary
    assert summary.count("<li") == 2 + 4 + 2  # two causes, with four claims and with two
    assert sections.count("the tokenizer has too few names") == 2, "once in each exam's section"
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    for finding in ledger.findings():
        assert ids.count(anchor(finding.id)) == 1
        assert f'href="#{anchor(finding.id)}"' in summary


def hostile_run(folder):
    def everything(context):
        labels = [HOSTILE, "שלום", " ", "\n", ""]
        values = np.linspace(-1, 1, 5)
        made = [
            figures.heatmap(np.outer(values, values), title=HOSTILE, caption=HOSTILE, rows=labels, columns=labels),
            figures.curve({HOSTILE: values}, title=HOSTILE, ticks=labels, references={HOSTILE: 0.5}, x_axis=HOSTILE),
            figures.bars(values, labels=labels, title=HOSTILE, references={HOSTILE: 0.1}, value_axis=HOSTILE),
            figures.attention(np.tile(np.eye(5), (2, 1, 1)), tokens=labels, heads=[HOSTILE, "1"], title=HOSTILE),
            figures.tokens(labels, values, title=HOSTILE, value_axis=HOSTILE),
            figures.table({HOSTILE.replace("\ud800", ""): ["<script>", "</td>"]}, title=HOSTILE),
            figures.text(HOSTILE, title=HOSTILE),
        ]
        refs = [context.figure(f"f{i}", figure) for i, figure in enumerate(made)]
        context.log(HOSTILE)
        yield context.claim(
            "x", HOSTILE, estimate=Estimate(value=1.0, low=0.5, high=1.5, n=3, unit=HOSTILE, method=HOSTILE),
            controls=[Control(name=HOSTILE, estimate=Estimate(value=0.0), description=HOSTILE)], p_value=0.01,
            test=HOSTILE, measured_on=DataNote(name=HOSTILE, hash=HOSTILE), sites=[HOSTILE], positions=HOSTILE,
            method=HOSTILE, figures=refs,
        )  # fmt: skip
        yield context.not_measured("y", HOSTILE, HOSTILE)
        raise ValueError(HOSTILE)

    exams = Registry(modules=())
    row = (
        example_calibration()
        .rows[0]
        .model_copy(update={"exam": "dummy.hostile", "located": Estimate.unknown(HOSTILE), "sources": {HOSTILE: 3}})
    )
    table = CalibrationTable(rows=(row,))
    exams.register(make_exam("dummy.hostile", run=everything, title=HOSTILE, question=HOSTILE, calibration=table))
    protocol = parse_protocol('name = "t"\n[[exam]]\nname = "*"', where="t").model_copy(
        update={"name": HOSTILE, "description": HOSTILE}
    )
    subject = DummySubject(name=HOSTILE, facts=DummyFacts(family=HOSTILE))
    passed = {HOSTILE: HOSTILE}
    return run_scan(
        subject, protocol, plan(protocol, exams=exams), out=folder, command=HOSTILE, base_command=HOSTILE, passed=passed
    )


def test_every_string_of_the_record_is_hostile_and_does_nothing(tmp_path):
    ledger = hostile_run(tmp_path / "run")
    path = write_report(ledger)
    page = path.read_text(encoding="utf-8")
    parsed = Page(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not any(tag == "img" for tag, _ in parsed.tags)
    assert page.count("</style>") == 1
    assert page.count("</title>") >= 1
    for char in ("\x00", "\u202e", "\u2066", "\ud800"):
        assert char not in page
    assert "␀" in page
    assert "⟨U+202E⟩" in page
    assert Ledger.open(tmp_path / "run").findings()[0].claim == HOSTILE, "the record itself keeps what it was given"
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)


def test_an_unfinished_and_an_empty_run_have_reports(tmp_path, ledger):
    def stop(context):
        raise KeyboardInterrupt
        yield

    exams = Registry(modules=())
    exams.register(make_exam("dummy.stop", run=stop))
    protocol = parse_protocol('name = "t"\n[[exam]]\nname = "*"', where="t")
    with pytest.raises(KeyboardInterrupt):
        run_scan(DummySubject(), protocol, plan(protocol, exams=exams), out=tmp_path / "run")
    page = render_report(Ledger.open(tmp_path / "run"))
    Page(page)
    assert "was interrupted" in page
    assert "no findings yet" in page


def test_a_missing_array_is_said_and_not_a_crash(ledger, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(ledger.folder, copy)
    (copy / "exams/circuits.patching/arrays.safetensors").unlink()
    assert "data are not in the run" in render_report(Ledger.open(copy))


def decode(image: bytes) -> np.ndarray:
    width, height = struct.unpack(">II", image[16:24])
    start = image.index(b"IDAT") + 4
    size = struct.unpack(">I", image[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(image[start : start + size]), np.uint8).reshape(height, width + 1)
    return rows[:, 1:]


def test_png_holds_the_steps_and_pillow_reads_it():
    steps = np.arange(42, dtype=np.uint8).reshape(6, 7)
    image = png(steps, scale="diverging", mode="light")
    np.testing.assert_array_equal(decode(image), steps)
    pillow = pytest.importorskip("PIL.Image")
    import io

    colours = np.asarray(pillow.open(io.BytesIO(image)).convert("RGB"))
    np.testing.assert_array_equal(colours, palette("diverging", "light")[steps])


def test_scales_are_symmetric_and_know_what_is_missing():
    values = np.array([-1.0, 0.0, 2.0, np.nan, np.inf])
    scale = Scale(values, kind="diverging")
    assert scale.steps(values).tolist() == [10, LEVELS // 2, LEVELS - 1, MISSING, MISSING]
    assert Scale(np.zeros(3), kind="sequential").steps(np.zeros(3)).tolist() == [0, 0, 0]
    assert Scale(np.array([np.nan]), kind="diverging").steps(np.array([np.nan]))[0] == MISSING
    sequential = Scale(np.array([0.0, 4.0]), kind="sequential")
    assert sequential.steps(np.array([0.0, 2.0, 4.0])).tolist() == [0, LEVELS // 2, LEVELS - 1]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_grow_away_from_the_page_and_differ_to_the_colour_blind(mode):
    def lightness(rgb):
        linear = (rgb / 255.0) ** 2.2
        return linear @ np.array([0.2126, 0.7152, 0.0722])

    steps = lightness(palette("sequential", mode)[:LEVELS].astype(float))
    assert np.all(np.diff(steps) < 0) if mode == "light" else np.all(np.diff(steps) > 0)
    ends = palette("diverging", mode)[[0, LEVELS - 1]].astype(float)
    deuteranopia = np.array([[0.625, 0.375, 0], [0.7, 0.3, 0], [0, 0.3, 0.7]])
    seen = ends @ deuteranopia.T
    assert np.abs(seen[0] - seen[1]).max() > 60


def test_shrinking_keeps_the_strongest():
    values = np.zeros((2, 5000))
    values[1, 4321] = -3.0
    values[0, 10] = 2.0
    small, by_row, by_column = shrink(values, limit=2048, center=0.0)
    assert (small.shape[0], by_row, by_column) == (2, 1, 3)
    assert small.shape[1] <= 2048
    assert small.min() == -3.0
    assert small.max() == 2.0


def reference(figure: Figure) -> tuple[FigureRef, dict[str, np.ndarray]]:
    ref = FigureRef.model_validate(
        {
            "name": "f", "exam": "e", "kind": figure.kind, "title": figure.title,
            "arrays": {k: k for k in figure.arrays},
            "labels": dict(figure.labels), "axes": dict(figure.axes), "scale": figure.scale,
            "references": dict(figure.references), "marks": figure.marks,
        }
    )  # fmt: skip
    return ref, dict(figure.arrays)


@pytest.mark.parametrize(
    "figure",
    [
        figures.heatmap(np.full((2, 3), np.nan), title="all missing"),
        figures.heatmap(np.zeros((1, 1)), title="one"),
        figures.heatmap(np.ones((3, 2)), title="few", scale="sequential"),
        figures.heatmap(np.random.default_rng(0).normal(size=(100, 9000)), title="huge"),
        figures.heatmap(np.random.default_rng(0).normal(size=(3000, 2)), title="tall"),
        figures.curve({"a": [np.nan, 1, np.nan, 2, 3]}, title="gaps"),
        figures.curve({"a": [1.0]}, title="a point"),
        figures.curve({"a": [np.nan]}, title="nothing"),
        figures.curve({str(i): np.arange(300.0) + i for i in range(12)}, title="many"),
        figures.bars([np.nan, -1.0, 2.0], labels=["a", "b", "c"], title="both ways", low=[0, -2, 1], high=[1, 0, 3]),
        figures.bars(np.arange(300.0), labels=range(300), title="many", marks=[7]),
        figures.bars([0.0], labels=["zero"], title="zero"),
        figures.attention(np.random.default_rng(0).random((40, 60, 60)), tokens=["t"] * 60, title="many heads"),
        figures.attention(np.ones((1, 1, 1)), tokens=["t"], title="one token"),
        figures.tokens([], [], title="none"),
    ],
    ids=lambda figure: f"{figure.kind}-{figure.title}",
)
def test_odd_figures_are_drawn_well_formed(figure):
    ref, arrays = reference(figure)
    markup = drawing.draw(ref, arrays, {})
    Page(markup)
    assert "nan" not in re.sub(r'href="[^"]*"', "", markup).lower()
    assert "inf" not in re.sub(r'href="[^"]*"', "", markup).lower()
    assert len(markup) < 2_500_000


def test_a_long_table_is_cut_and_says_so():
    markup = drawing.table({"n": list(range(5000)), "word": ["a b"] * 5000})
    assert "100 of 5,000 rows" in markup
    assert markup.count("<tr>") == 101


def test_evidence_says_what_is_not_known(ledger):
    finding = ledger.finding("circuits.patching/head")
    unknown = Control(name="lost", estimate=Estimate.unknown("too few"))
    assert "not measured: too few" in evidence(finding.model_copy(update={"controls": (unknown,)}))


def test_small_things():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 9) == [-2.5, 0, 2.5, 5, 7.5]
    assert ticks(2, 2) == [2]
    assert visible("a\x07b\u202e") == "a␇b⟨U+202E⟩"
    assert token_text(" a\n") == "·a⏎"
    assert token_text("") == "∅"
    assert escape("<\"&'>") == "&lt;&quot;&amp;&#x27;&gt;"
    assert [duration(s) for s in (0.44, 12, 185, 7800)] == ["0.4 s", "12 s", "3 min 5 s", "2 h 10 min"]
