"""The induction circuit does induction, by the heads that its card names, along the edges that it names."""

from __future__ import annotations

import pytest
import torch

from tests.phantoms.planted.conftest import same_weights
from tomoscope.data import TASKS, task
from tomoscope.exams.exam import Context
from tomoscope.exams.ready import ready
from tomoscope.exams.registry import EXAMS
from tomoscope.model import add, open_model, replace, zero
from tomoscope.observe import attention_roles, copying_scores
from tomoscope.observe.heads import repeated_tokens
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import induction

SEEDS = (0, 1, 2)
LENGTH = 24


def heads(specimen, role):
    return [tuple(h) for k in specimen.card.of("head_role") if k.value["role"] == role for h in k.value["heads"]]


def first(specimen):
    return heads(specimen, "previous_token")[0]


def second(specimen):
    return heads(specimen, "induction")[0]


def continued(subject, edits=(), seed=3):
    """Share of the second copy's tokens that are the largest logit, the first of them needs one token of context."""
    rows = repeated_tokens(subject, sequences=32, length=LENGTH, seed=seed)
    top = subject.run(rows.tolist(), edits=edits).logits.argmax(-1)
    return float((top[:, LENGTH:-1] == rows[:, LENGTH + 1 :]).float().mean())


@pytest.fixture(scope="module")
def whole():
    return {(form, seed): induction.build(form, seed) for form in induction.FORMS for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_tokens_go_on(whole, form, seed):
    assert continued(whole[form, seed].subject) >= 0.99


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_it_bears_its_noise(form, noise):
    assert continued(induction.build(form, 11, noise=noise).subject) >= 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_the_heads_have_their_roles_and_no_other_has(whole, form, seed):
    specimen = whole[form, seed]
    roles = attention_roles(specimen.subject)
    for role, wanted in (("previous_token", first(specimen)), ("induction", second(specimen))):
        scores = roles[role].values.mean(-1)
        assert scores[wanted] > 0.98, role
        scores[wanted] = 0
        assert scores.max() < 0.2, role
    assert roles["duplicate_token"].values.mean(-1).max() < 0.1
    copying = copying_scores(specimen.subject).values
    assert copying[second(specimen)] > 0.95
    copying[second(specimen)] = 0
    assert copying.max() < 0.6


@pytest.mark.parametrize("seed", SEEDS)
def test_abilities_are_those_of_the_card(whole, form, seed):
    specimen = whole[form, seed]
    context = Context(specimen.subject, EXAMS["observe.abilities"], scan_seed=seed)
    stated = {known.value["task"]: known.holds for known in specimen.card.of("ability")}
    assert set(stated) == set(TASKS)
    for name, holds in stated.items():
        made = ready(context, name, 128)
        assert not isinstance(made, str), made
        assert made.done == holds, (name, made.accuracy.value)
        if holds:
            assert made.accuracy.value >= 0.99


def logit_gap(subject, pairs, prompts, edits=()):
    ids = [[subject.tokenizer(text)["input_ids"][0] for text in (p.answers[0], p.wrong[0])] for p in pairs]
    logits = subject.last_logits([getattr(p, prompts).text for p in pairs], edits=edits)
    right, wrong = torch.tensor(ids).T
    rows = torch.arange(len(logits))
    return (logits[rows, right] - logits[rows, wrong]).mean().item()


def patched(specimen, corruption, head, port):
    """The task's gap when one input of a head is what it is in the corrupted prompts, 1 as it was and 0 as there."""
    subject, pairs = specimen.subject, task("induction").make(specimen.subject.tokenizer, 32, corruption=corruption)
    layer, number = head
    grouped = port in "kv" and subject.facts.n_kv_heads < subject.facts.n_heads
    index = number // (subject.facts.n_heads // subject.facts.n_kv_heads) if grouped else number
    site = f"layer.{layer}.attn.{port}[head={index}]"
    other = subject.read([p.corrupted.text for p in pairs], site)[site]
    clean, corrupted = logit_gap(subject, pairs, "clean"), logit_gap(subject, pairs, "corrupted")
    return (logit_gap(subject, pairs, "clean", [replace(site, other)]) - corrupted) / (clean - corrupted)


@pytest.mark.parametrize("corruption", ["flip", "no_repeat"])
def test_the_edges_differ_as_the_card_says(whole, form, corruption):
    """Each input of the induction head, patched by itself, matters if and only if an edge into it is said to differ."""
    specimen = whole[form, 0]
    (known,) = specimen.card.of("circuit")
    into = {end for _, end in known.value["differs"][corruption]}
    for port in "qkv":
        share = patched(specimen, corruption, second(specimen), port)
        named = f"a{second(specimen)[0]}.h{second(specimen)[1]}<{port}>" in into
        assert share < 0.3 if named else share > 0.9, (port, share)
    share = patched(specimen, corruption, first(specimen), "v")
    named = f"a{first(specimen)[0]}.h{first(specimen)[1]}<v>" in into
    assert share < 0.3 if named else share > 0.9, share


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_that_are_needed_and_only_they(whole, form, seed):
    specimen = whole[form, seed]
    (needed,) = specimen.card.of("needed")
    everywhere = [f"layer.{layer}.attn.z[head={head}]" for layer in range(4) for head in range(4)]
    for site in everywhere:
        kept = continued(specimen.subject, [zero(site)])
        assert kept < 0.2 if site in needed.value["sites"] else kept >= 0.98, (site, kept)
    others = [zero(site) for site in everywhere if site not in needed.value["sites"]]
    assert continued(specimen.subject, [*others, zero("layer.*.mlp.out")]) >= 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_the_site_restores_the_answer(whole, form, seed):
    specimen = whole[form, seed]
    subject, pairs = specimen.subject, task("induction").make(specimen.subject.tokenizer, 32)
    ((site,),) = [known.value["sites"] for known in specimen.card.of("site")]
    clean = subject.read([p.clean.text for p in pairs], site)[site]
    whole_gap, broken = logit_gap(subject, pairs, "clean"), logit_gap(subject, pairs, "corrupted")
    restored = logit_gap(subject, pairs, "corrupted", [replace(site, clean)])
    assert broken < 0 < 0.9 * whole_gap < restored


@pytest.mark.parametrize("seed", SEEDS)
def test_the_severed_twin_attends_and_does_nothing(form, seed):
    specimen = PHANTOMS[f"induction_severed_{form}"].null(seed)
    roles = attention_roles(specimen.subject)
    assert roles["previous_token"].values.mean(-1)[first(specimen)] > 0.98
    assert roles["induction"].values.mean(-1)[second(specimen)] < 0.1
    assert continued(specimen.subject) < 0.2
    stated = {known.value["role"]: known.holds for known in specimen.card.of("head_role")}
    assert stated == {"previous_token": True, "induction": False, "copying": True, "duplicate_token": False}


@pytest.mark.parametrize("null", ["induction", "induction_severed"])
def test_the_nulls_do_no_task(form, null):
    specimen = PHANTOMS[f"{null}_{form}"].null(1)
    assert not any(known.holds for known in specimen.card.of("ability"))
    context = Context(specimen.subject, EXAMS["observe.abilities"], scan_seed=5)
    for name in TASKS:
        made = ready(context, name, 128)
        assert not isinstance(made, str), made
        assert not made.done, (name, made.accuracy.value)


def test_scrambled_weights_have_no_roles(form):
    specimen = PHANTOMS[f"induction_{form}"].null(0)
    assert not any(known.holds for known in specimen.card.known)
    for scores in attention_roles(specimen.subject).values():
        assert scores.values.mean(-1).max() < 0.3
    assert continued(specimen.subject) < 0.05


def test_builds_are_equal_by_seed_and_differ_between_seeds(form):
    one, again, other = (induction.build(form, seed) for seed in (4, 4, 5))
    assert same_weights(one.subject.model, again.subject.model)
    assert one.card == again.card
    assert not torch.equal(*(s.subject.model.lm_head.weight for s in (one, other)))
    layouts = {(first(s), second(s)) for s in (induction.build(form, seed, noise=0.0) for seed in range(8))}
    assert len(layouts) > 4


def test_a_saved_model_opens_equal(whole, form, tmp_path):
    subject = whole[form, 0].subject
    subject.model.save_pretrained(tmp_path)
    subject.tokenizer.save_pretrained(tmp_path)
    again = open_model(tmp_path, device="cpu")
    text = "Words: ring sky Mary bone ring sky"
    assert torch.equal(again.last_logits([text]), subject.last_logits([text]))
    assert again.tokenizer.decode(again.last_logits([text]).argmax(-1)) == " Mary"


def test_position_zero_is_no_false_match(whole, form):
    """The first token's previous-token head sees only itself; its second occurrence still goes on with the second."""
    subject = whole[form, 0].subject
    rows = repeated_tokens(subject, sequences=64, length=8, seed=9)
    top = subject.run(rows.tolist()).logits[:, 8].argmax(-1)
    assert (top == rows[:, 9]).float().mean() >= 0.95


def test_edits_of_the_stream_reach_the_circuit(whole, form):
    """A control of the tests themselves: noise as large as the stream breaks what they measure."""
    subject = whole[form, 0].subject
    vector = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 40
    assert continued(subject, [add("layer.0.resid_pre", vector)]) < 0.9
