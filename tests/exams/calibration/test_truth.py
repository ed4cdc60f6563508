"""What cards say of exams' claims, on the phantoms' own cards, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from tomoscope.data import TASKS
from tomoscope.errors import DataError
from tomoscope.exams import EXAMS
from tomoscope.exams.calibration.memory import Memory
from tomoscope.exams.calibration.sources import (
    NULLS,
    OWN_TASKS,
    find_sources,
    fingerprint,
    shuffled,
    tasks_as,
    with_pairs,
)
from tomoscope.exams.calibration.truth import TRUTHS, Place, kind_of
from tomoscope.phantoms import PHANTOMS, Card, Known, Specimen
from tomoscope.phantoms.planted.words import task_tokenizer
from tomoscope.phantoms.routed import WAYS, Route


def expected(card: Card, exam: str, **options):
    made = TRUTHS[exam].expect(card, EXAMS[exam].configure(options))
    return {one.key: one for one in made}


def test_every_exam_has_a_truth_and_its_keys_have_kinds():
    assert set(TRUTHS) == {name for name in EXAMS if not name.startswith(("test.", "dummy.", "mine."))}
    patching = EXAMS["circuits.patching"]
    assert [kind_of(patching, f"facts_{kind}") for kind in ("head", "mlp", "arrival", "linear")] == [
        "head", "mlp", "arrival", "linear"]  # fmt: skip
    assert kind_of(patching, "applies") == kind_of(patching, "failed") == ""
    assert kind_of(EXAMS["observe.head_roles"], "induction") == "induction"
    assert kind_of(EXAMS["circuits.causal_tracing"], "facts_attention") == "attention"
    assert kind_of(EXAMS["observe.abilities"], "ioi") == ""


def test_an_induction_circuits_card():
    specimen = PHANTOMS["induction_gpt2"].build(1)
    ((layer, head),) = next(k for k in specimen.card.of("head_role") if k.value["role"] == "induction").value["heads"]
    roles = expected(specimen.card, "observe.head_roles")
    assert {key: one.holds for key, one in roles.items()} == {
        "previous_token": True, "induction": True, "copying": True, "duplicate_token": False}  # fmt: skip
    assert roles["induction"].places == (Place(layer, "attn", head),)
    assert roles["induction"].named
    abilities = expected(specimen.card, "observe.abilities")
    assert {key for key, one in abilities.items() if one.holds} == {"induction"}
    assert set(TASKS) <= set(abilities)
    patching = expected(specimen.card, "circuits.patching")
    assert {key for key, one in patching.items() if one.holds} == {"induction_head", "induction_arrival"}
    assert patching["induction_head"].places == (Place(layer, "attn", head),)
    assert patching["induction_arrival"].right([f"layer.{layer}.resid_pre"], "end")
    assert not patching["induction_mlp"].holds, "the circuit has no MLP"
    assert "induction_linear" not in patching, "no card can say"
    assert {one.holds for key, one in patching.items() if not key.startswith("induction")} == {False}
    assert Counter(one.kind for key, one in patching.items() if not one.holds) == {
        "head": 4, "mlp": 5, "arrival": 4, "linear": 4}  # fmt: skip
    discovery = expected(specimen.card, "circuits.discovery")
    assert discovery["induction_circuit"].right([f"layer.{layer}.attn.z[head={head}]"], "all")
    assert [key for key, one in discovery.items() if one.holds] == ["induction_circuit"], "of the rest no card can say"
    assert not discovery["ioi_stable"].holds
    direct = expected(specimen.card, "observe.direct_attribution")
    assert direct["induction"].places == (Place(layer, "attn", head),)
    assert [one.holds for one in direct.values()].count(True) == 1
    assert expected(specimen.card, "observe.token_attribution")["induction"].positions == ("earlier", "copied")
    assert {one.holds for one in expected(specimen.card, "circuits.causal_tracing").values()} == {False}
    null = PHANTOMS["induction_gpt2"].null(1)
    for exam in (
        "observe.head_roles",
        "observe.abilities",
        "circuits.patching",
        "circuits.discovery",
        "observe.direct_attribution",
    ):
        assert {one.holds for one in expected(null.card, exam).values()} == {False}


@pytest.mark.parametrize("way", WAYS)
def test_a_known_route(way):
    route = Route(way, 1, 2, {"alone": None, "before": 0, "after": 3}[way])
    card = Card("routed", 0, "", route.known("facts"))
    head = Place(1, "attn", 2)
    patching = expected(card, "circuits.patching")
    assert patching["facts_head"].places == (head,)
    assert patching["facts_mlp"].holds is (way != "alone")
    assert patching["facts_arrival"].places == (Place(1, "block"),)
    direct = expected(card, "observe.direct_attribution")["facts"]
    assert (direct.holds, direct.places) == ((True, (head,)) if way != "after" else (False, ()))
    tracing = expected(card, "circuits.causal_tracing", window=3)
    assert tracing["facts"].holds is (way == "before"), "the claim is of the subject's token"
    assert tracing["facts_attention"].right(["layer.2.attn.out"], "last token")
    assert not tracing["facts_attention"].right(["layer.3.attn.out"], "last token")
    assert expected(card, "observe.token_attribution")["facts"].positions == ("subject",)


def test_depths():
    written = PHANTOMS["written"]
    one = expected(written.build(0).card, "observe.logit_lens")["formed"]
    assert one.holds
    assert one.right([f"layer.{one.places[0].layer}.resid_post"], "all")
    assert not expected(written.null(0).card, "observe.logit_lens")["formed"].holds
    rotated = PHANTOMS["rotated"]
    assert expected(rotated.build(0).card, "observe.tuned_lens")["gain"].holds
    assert not expected(rotated.build(0).card, "observe.logit_lens")["formed"].holds
    assert not expected(rotated.null(0).card, "observe.tuned_lens")["gain"].holds


def test_what_no_card_says_is_not_expected():
    assert not any(list(TRUTHS[name].expect(Card("x", 0, ""), EXAMS[name].options())) for name in TRUTHS)
    vague = Card("x", 0, "", (Known("ability", {"task": "facts"}),))
    assert list(expected(vague, "circuits.patching")) == []
    assert list(expected(vague, "observe.direct_attribution")) == []


@pytest.mark.parametrize(("name", "writes"), [("compiled_previous_token", "attn"), ("compiled_histogram", "mlp")])
def test_phantoms_that_bring_pairs_have_a_task_of_them(name, writes):
    phantom = PHANTOMS[name]
    for specimen, holds in ((phantom.build(0), True), (phantom.null(0), False)):
        made = with_pairs(specimen)
        ((task, spec),) = made.data[OWN_TASKS].items()
        assert len(spec.make(made.subject.tokenizer, 5)) == 5
        with tasks_as(made.data[OWN_TASKS]) as new:
            assert new == [task]
            tasks = {"tasks": (task,)}
            assert expected(made.card, "observe.abilities", **tasks)[task].holds is holds
            patching = expected(made.card, "circuits.patching", **tasks)
            kind = {"attn": "head", "mlp": "mlp"}[writes]
            assert patching[f"{task}_{kind}"].holds is holds
            direct = expected(made.card, "observe.direct_attribution", **tasks)[task]
            assert direct.holds is (holds and writes == "attn")
        assert task not in TASKS


def test_pairs_with_one_answer_are_no_task():
    specimen = PHANTOMS["compiled_fraction_so_far"].build(0)
    assert len({pair.answers for pair in specimen.data["pairs"]}) == 1
    assert with_pairs(specimen) is specimen


def test_shuffled_answers_are_the_same_answers_of_other_prompts():
    tokenizer = task_tokenizer()
    for name in ("facts", "agreement", "ioi"):
        plain = TASKS[name].make(tokenizer, 40, seed=3)
        one, again, other = (shuffled(TASKS[name], seed).make(tokenizer, 40, seed=3) for seed in (1, 1, 2))
        assert one.clean == plain.clean
        assert one.corrupted == plain.corrupted
        assert Counter((p.answers, p.wrong) for p in one) == Counter((p.answers, p.wrong) for p in plain)
        assert [p.answers for p in one] != [p.answers for p in plain]
        assert one == again
        assert [p.answers for p in one] != [p.answers for p in other]


def test_tasks_are_made_and_encoded_once_and_equal():
    tokenizer = task_tokenizer()
    plain = TASKS["facts"].make(tokenizer, 12, seed=4)
    with tasks_as(Memory().tasks()):
        one, again = (TASKS["facts"].make(tokenizer, 12, seed=4) for _ in range(2))
        other = TASKS["facts"].make(tokenizer, 12, seed=5)
        assert one is again
        assert one.encode(tokenizer) is again.encode(tokenizer)
        for _ in range(2):
            with pytest.raises(DataError):
                TASKS["facts"].make(PHANTOMS["compiled_histogram"].build(0).subject.tokenizer, 12)
    assert one.pairs == plain.pairs != other.pairs
    assert one.digest() == plain.digest()
    assert one.encode(tokenizer) == plain.encode(tokenizer)
    assert one[:5].encode(tokenizer) == plain[:5].encode(tokenizer)
    assert type(TASKS["facts"].make(tokenizer, 12, seed=4)) is type(plain)


def test_nulls_say_what_they_lack_and_differ_by_seed():
    for source in NULLS:
        one, two = source.null(0), source.null(1)
        assert {known.holds for known in one.card.known} == {False}
        assert {known.value["task"] for known in one.card.of("ability")} >= set(TASKS)
        assert fingerprint(one, "x") == fingerprint(source.null(0), "x") != fingerprint(two, "x")
    assert [source.name for source in find_sources(["untr*"])] == ["untrained"]


def test_a_specimen_without_a_model_is_its_own():
    assert fingerprint(Specimen(object(), Card("x", 0, "")), "x/null/0") == "x/null/0"
