"""Patch grids against one plain run per cell; the estimate against the grid; tracing against edited runs and a
reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.zoo import ZOO
from tomoscope.circuits import (
    KL,
    Engine,
    LogitDifference,
    Pairs,
    Probability,
    activation_patching,
    answer_log_probabilities,
    attribution_patching,
    causal_trace,
    severed_trace,
)
from tomoscope.data import Prompt
from tomoscope.errors import AlignmentError, SiteError, UnavailableSiteError
from tomoscope.model import Encoded, Subject, add, build_subject, open_model, replace

MODELS = [name for name, entry in ZOO.items() if entry.kind in ("decoder", "encoder")]
PARTS = ("resid_pre", "resid_mid", "resid_post", "attn.out", "mlp.out", "attn.z")
PLACES = [1, 3, -1]


def subject_of(name: str) -> Subject:
    return build_subject(ZOO[name].build(), name=name)


def pairs_of(subject: Subject, *, equal: bool = False) -> Pairs:
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(0)).tolist()
    other = [[*row[:2], 50, 51, *row[4:]] for row in ids]
    if not equal:
        ids[0], other[0] = ids[0][1:], other[0][1:]
    answers, wrong = torch.tensor([[5], [6], [7]]), torch.tensor([[15], [16], [17]])
    return Pairs(subject.tokens(ids), subject.tokens(other), answers, wrong)


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_equals_a_plain_run_with_one_edit(name: str) -> None:
    subject = subject_of(name)
    pairs = pairs_of(subject)
    metric = pairs.metric()
    for part in PARTS:
        if not subject.sites()[f"layer.1.{part}"].available:
            with pytest.raises(UnavailableSiteError, match="parallel"):
                activation_patching(subject, pairs, part=part, positions=PLACES)
            continue
        grid = activation_patching(subject, pairs, part=part, positions=PLACES)
        assert grid.mode == ("suffix" if subject.facts.renormalised else "sliced"), part
        values = subject.read(pairs.clean, f"layer.*.{part}", at=PLACES)
        for layer in range(3):
            for place, at in enumerate(PLACES):
                for head in range(4 if part == "attn.z" else 1):
                    site, new = f"layer.{layer}.{part}", values[f"layer.{layer}.{part}"][:, place]
                    got = grid.values[layer, place]
                    if part == "attn.z":
                        site, new, got = f"{site}[head={head}]", new[:, head], got[head]
                    logits = subject.last_logits(pairs.corrupted, edits=[replace(site, new, at=at)])
                    torch.testing.assert_close(got, metric(logits, torch.arange(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["probability", "kl", "logits"])
def test_metrics_and_both_directions(metric: str) -> None:
    subject = subject_of("llama")
    pairs = pairs_of(subject, equal=True)
    clean = subject.last_logits(pairs.clean)
    judge = {
        "probability": Probability(pairs.answers, pairs.wrong),
        "kl": KL(clean),
        "logits": LogitDifference(pairs.answers, pairs.wrong),
    }[metric]
    for denoising in (True, False):
        grid = activation_patching(subject, pairs, denoising=denoising, metric=judge)
        assert grid.values.shape == (3, 7, 3)
        # the stream into the first block at positions that do not differ is the same in both runs: no effect
        assert float(grid.effect[0, [0, 1, 4, 5]].abs().max()) < 1e-5
        # the stream at the last position of the last block decides everything but its own block
        source = clean if denoising else subject.last_logits(pairs.corrupted)
        end = activation_patching(subject, pairs, part="resid_post", denoising=denoising, metric=judge)
        torch.testing.assert_close(end.values[2, 6], judge(source, torch.arange(3)), rtol=1e-4, atol=1e-5)
    if metric == "logits":
        assert float(end.normalised[2, 6]) == pytest.approx(0.0, abs=1e-4)


def test_kl_and_logit_difference_are_their_formulas() -> None:
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    reference = torch.randn(2, 10, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(2)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(KL(reference)(logits, rows), expected.sum(-1))
    metric = LogitDifference([[1, 2], [3, -1]], [[4, -1], [5, 6]])
    full = metric(logits, rows)
    assert float(full[0]) == pytest.approx(float(logits[0, 1:3].mean() - logits[0, 4]), abs=1e-6)
    assert float(full[1]) == pytest.approx(float(logits[1, 3] - logits[1, 5:7].mean()), abs=1e-6)
    torch.testing.assert_close(metric(logits[:, metric.tokens], rows), full)


def test_the_estimate_is_exact_for_small_differences() -> None:
    subject = subject_of("gpt2")
    pairs = pairs_of(subject, equal=True)
    for part in ("resid_pre", "mlp.out", "attn.z"):
        base = subject.read(pairs.corrupted, f"layer.1.{part}")[f"layer.1.{part}"]
        clean = subject.read(pairs.clean, f"layer.1.{part}")[f"layer.1.{part}"]
        estimate = attribution_patching(subject, pairs, part=part).effect[1]
        engine = Engine(subject, pairs.corrupted)
        columns = torch.arange(7).expand(3, -1)
        start = pairs.metric()(subject.last_logits(pairs.corrupted), torch.arange(3))
        small = engine.patches(1, part, columns, base + 1e-2 * (clean - base), pairs.metric()) - start
        small = small if part == "attn.z" else small[:, 0]
        torch.testing.assert_close(100 * small, estimate, rtol=0.1, atol=0.03 * float(estimate.abs().max()))


def test_unequal_lengths_need_named_positions() -> None:
    subject = subject_of("gpt2")
    with pytest.raises(AlignmentError, match="positions"):
        activation_patching(subject, pairs_of(subject))
    with pytest.raises(SiteError, match="one of"):
        activation_patching(subject, pairs_of(subject, equal=True), part="attn.q")


def test_log_probabilities_of_answers_of_several_tokens() -> None:
    subject = subject_of("llama")
    prompts, answers = [[5, 6, 7], [8, 9]], [[10, 11], [12]]
    got = answer_log_probabilities(subject, prompts, answers)
    for row in range(2):
        ids = torch.tensor([prompts[row] + answers[row]])
        with torch.no_grad():
            scores = subject.model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(prompts[row]) - 1
        expected = sum(scores[start + i, token] for i, token in enumerate(answers[row]))
        assert float(got[row]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attn"])
def test_traces_equal_plain_edited_runs(kind: str) -> None:
    subject = subject_of("gpt2")
    prompt = Encoded((5, 6, 7, 8, 9, 10), {"subject": (1, 3)})
    trace = causal_trace(subject, prompt, 11, kind=kind, sigma=0.7, draws=3, window=2, seed=4)
    noise = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(4)) * 0.7
    part = {"hidden": "resid_post", "mlp": "mlp.out", "attn": "attn.out"}[kind]
    clean = subject.read([prompt], f"layer.*.{part}").stack(f"layer.*.{part}")[:, 0]
    corrupt = add("embed", noise, at="subject.all")
    for token in (0, 2, 5):
        for layer in range(3):
            span = [layer] if kind == "hidden" else [x for x in range(layer - 1, layer + 1) if 0 <= x < 3]
            edits = [corrupt, *(replace(f"layer.{x}.{part}", clean[x, token], at=token) for x in span)]
            expected = subject.last_logits([prompt] * 3, edits=edits).softmax(-1)[:, 11]
            torch.testing.assert_close(trace.values[token, layer], expected, rtol=1e-3, atol=1e-6)


REFERENCE = Path(__file__).parents[2] / "reference" / "rome"


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attn"])
def test_traces_equal_the_public_reference(kind: str) -> None:
    """Numbers that the causal tracing of Meng et al.'s own code gave on a tiny GPT-2 in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE / "tok")
    subject = open_model(REFERENCE, tokenizer=tokenizer, dtype="float64")
    text, name = "The Space Needle is in the city of", "The Space Needle"
    prompt = Prompt(text, {"subject": (0, len(name))})
    batch = subject.tokens([prompt])
    assert batch.prompts[0].spans["subject"] == (0, 9)
    answer = int(subject.last_logits(batch).argmax())
    noise = torch.from_numpy(np.random.RandomState(1).randn(10, 9, 32))
    trace = causal_trace(subject, prompt, answer, kind=kind, sigma=0.45438786990546126, window=3, noise=noise)
    reference = np.load(REFERENCE / "traces.npz")
    low, high = reference[f"trace_{kind}_lowhigh"]
    assert float(trace.corrupted.mean()) == pytest.approx(low, rel=1e-9)
    assert trace.clean == pytest.approx(high, rel=1e-9)
    np.testing.assert_allclose(trace.values.mean(-1).numpy(), reference[f"trace_{kind}"], rtol=1e-9)


@pytest.mark.parametrize("sever", ["mlp", "attn"])
def test_severed_traces_equal_the_public_reference(sever: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE / "tok")
    subject = open_model(REFERENCE, tokenizer=tokenizer, dtype="float64")
    prompt = Prompt("The Space Needle is in the city of", {"subject": (0, 16)})
    answer = int(subject.last_logits([prompt]).argmax())
    draw = np.random.RandomState(1)
    held, noise = (torch.from_numpy(draw.randn(10, 9, 32)) for _ in range(2))
    found = severed_trace(subject, prompt, answer, sever=sever, sigma=0.45438786990546126, noise=noise, held_noise=held)
    expected = np.load(REFERENCE / "edits.npz")[f"trace_severed_{sever}"]
    np.testing.assert_allclose(found.mean(-1).numpy(), expected, rtol=1e-9)
    with pytest.raises(SiteError, match="severed"):
        severed_trace(subject, prompt, answer, sever="hidden", sigma=1.0)


def test_many_pairs_are_patched_in_pieces_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    whole = activation_patching(subject, pairs, part="attn.z", positions=PLACES)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("tomoscope.circuits.patching.activation._pairs_at_once", lambda *a: 2)
    pieces = activation_patching(
        subject, pairs, part="attn.z", positions=PLACES, progress=lambda *done: seen.append(done)
    )
    torch.testing.assert_close(pieces.values, whole.values, rtol=1e-4, atol=1e-5)
    assert pieces.mode == "sliced"
    assert seen == [(3, 6), (6, 6)]
