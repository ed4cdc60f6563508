"""The same seed gives the same findings: twice, alone or in a scan, and by the finding's own command."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.exams.test_zoo import SMALL
from tests.exams.world import random_subject, trained_subject
from tomoscope.cli.main import app
from tomoscope.errors import ProtocolError
from tomoscope.exams import EXAMS, Context, examine
from tomoscope.exams.patching import linearised_shares
from tomoscope.exams.ready import GATE, able, ready
from tomoscope.exams.tracing import aligned
from tomoscope.findings import Ledger

TASKS = {"tasks": ("facts", "gendered_pronoun")}
OPTIONS = SMALL | {
    "observe.abilities": {"n": GATE, **TASKS},
    "observe.direct_attribution": {"n": 24, **TASKS},
    "observe.token_attribution": {"n": 24, "steps": 4, **TASKS},
    "circuits.patching": {"n": 24, **TASKS},
    "circuits.discovery": {"n": 24, "draws": 4, "resamples": 3, **TASKS},
}


def run(name: str, shared: dict | None = None, seed: int = 0):
    exam = EXAMS[name]
    context = Context(
        trained_subject(), exam, options=exam.configure(OPTIONS[name]), scan_seed=seed,
        shared={} if shared is None else shared,
    )  # fmt: skip
    text = [finding.model_dump_json() for finding in exam.run(context)]
    return text, context.arrays


@pytest.fixture(scope="module")
def together():
    shared: dict = {}
    return {name: run(name, shared) for name in EXAMS}


@pytest.mark.parametrize("name", list(SMALL))
def test_alone_and_together_byte_by_byte(name, together):
    alone, arrays = run(name)
    assert alone == together[name][0]
    assert arrays.keys() == together[name][1].keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, together[name][1][key])


def test_a_task_is_made_and_scored_once_a_scan(monkeypatch):
    subject, calls = trained_subject(), []
    forward = type(subject).last_logits
    monkeypatch.setattr(
        type(subject), "last_logits", lambda self, *a, **k: (calls.append(len(a[0])), forward(self, *a, **k))[1]
    )

    def tasks_scored(shared_by_all: bool) -> int:
        calls.clear()
        shared: dict = {}
        for name in ("observe.abilities", "observe.direct_attribution", "observe.token_attribution"):
            run(name, shared if shared_by_all else {})
        return sum(n in (GATE, GATE // 2) for n in calls)

    # two tasks, a clean and a corrupted run each: once in a scan, three times where nothing is shared
    assert (tasks_scored(True), tasks_scored(False)) == (4, 12)


def test_a_part_of_a_task_is_its_first_pairs_judged_on_all():
    context = Context(trained_subject(), EXAMS["circuits.patching"])
    whole, part = ready(context, "facts", GATE // 2), able(context, "facts", 10)
    assert list(part.raw) == list(whole.raw)[:10]
    assert len(part.pairs) == len(part.scores) == 10
    assert part.accuracy == whole.accuracy
    assert part.p_value == whole.p_value


def test_the_command_of_a_finding_gives_the_finding(tmp_path):
    subject = trained_subject()
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    runner = CliRunner()
    for name, more in (("first", []), ("other", ["--seed", "5"])):
        command = ["scan", str(tmp_path / "model"), "--exam", "circuits.patching", *more]
        command += ["--option", "circuits.patching.n=24", "--option", 'circuits.patching.tasks=["facts"]']
        made = runner.invoke(app, [*command, "--out", str(tmp_path / name)])
        assert made.exit_code == 0, made.output
        found = Ledger.open(tmp_path / name).findings()
        again = [*shlex.split(found[0].reproduce)[1:], "--out", str(tmp_path / f"{name} again")]
        assert runner.invoke(app, again).exit_code == 0
        assert Ledger.open(tmp_path / f"{name} again").findings() == found


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("observe.abilities", {"tasks": ("ioi", "chess")}, "tasks"),
        ("circuits.patching", {"tasks": ()}, "tasks"),
        ("circuits.patching", {"tasks": ("ioi", "ioi")}, "tasks"),
        ("circuits.patching", {"n": 2}, "'n'"),
        ("circuits.patching", {"denoise": True}, "denoising"),
        ("circuits.causal_tracing", {"factor": 0}, "factor"),
        ("circuits.causal_tracing", {"facts": 3}, "facts"),
        ("observe.head_roles", {"permutations": 5}, "permutations"),
        ("observe.tuned_lens", {"learning_rate": float("inf")}, "learning_rate"),
        ("observe.logit_lens", {"texts": "many"}, "texts"),
    ],
)
def test_options_are_checked(name, options, said):
    with pytest.raises(ProtocolError, match=said):
        EXAMS[name].configure(options)


def test_shares_of_a_gap_have_the_ratios_mean_and_spread():
    generator = np.random.default_rng(0)
    gap = generator.normal(2.0, 0.5, 4000)
    effect = 0.3 * gap + generator.normal(0, 0.1, 4000)
    shares = linearised_shares(effect, gap)
    assert shares.mean() == pytest.approx(effect.mean() / gap.mean(), abs=1e-12)
    rows = generator.integers(0, 4000, (2000, 4000))
    spread = (effect[rows].mean(1) / gap[rows].mean(1)).std()
    assert shares.std() / np.sqrt(4000) == pytest.approx(spread, rel=0.05)
    np.testing.assert_allclose(linearised_shares(gap, gap), 1.0)


def test_traces_are_aligned_at_their_subject():
    effect = np.arange(7.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(aligned(effect, 1, 5)[:, 0], [1, 2.5, 4, 5, 6])
    np.testing.assert_array_equal(aligned(effect, 2, 3)[:, 0], [np.nan, np.nan, 2, 4, 6])


def test_a_gap_that_is_not_there_is_not_shared(monkeypatch):
    subject = random_subject("gpt2", 1)
    context = Context(subject, EXAMS["circuits.patching"])
    from tomoscope.exams import patching

    task = ready(context, "gendered_pronoun", 24)
    monkeypatch.setattr(patching, "able", lambda context, name, n: task)
    (finding,) = examine(EXAMS["circuits.patching"], subject, options={"tasks": ("gendered_pronoun",)})
    assert finding.verdict == "not measured"
    assert "no gap to share" in finding.reason
    assert "[" in finding.reason  # the numbers
