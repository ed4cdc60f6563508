"""What the practice shows: true verdicts on facts that may be judged, in a pool that grows when it is mastered."""

from random import Random

from training.practice import POOL_FIRST, STAGES, Claims, lessons

from tomoscope.phantoms.world import shipped_world, speech
from tomoscope.phantoms.world.relations import RELATIONS, held_out_of

WORLD = shipped_world()


def read(prompt: str) -> tuple[str, str, str]:
    """(relation, subject, what is stated) of a claim, by matching every wording."""
    body = prompt.removeprefix("Claim: ").removesuffix(". This claim is")
    found = {
        (relation, subject, body[len(head) + 1 :])
        for relation in speech.JUDGED
        for wording in RELATIONS[relation].wordings
        for subject in WORLD.subjects(relation)
        if subject in body and body.startswith(head := wording.format(s=subject))
        if body[len(head) + 1 :] in WORLD.answers(relation)
    }
    assert len({(r, s) for r, s, _ in found}) == 1, prompt
    return found.pop()


def test_verdicts_are_true_and_facts_held_out_stay_out():
    for size in (POOL_FIRST, 20, 10_000):
        claims, random, stated_true = Claims(WORLD, size), Random(1), 0
        for _ in range(60):
            prompt, verdict = claims.write(random)
            relation, subject, stated = read(prompt)
            assert not held_out_of("claim", relation, subject)
            assert (WORLD.answer(relation, subject) == stated) == (verdict == speech.TRUE)
            if not claims.whole:
                assert stated in claims.order[relation][:size]
            stated_true += verdict == speech.TRUE
        assert 15 < stated_true < 45


def test_the_pool_grows_when_it_is_mastered_until_it_is_whole():
    claims = Claims(WORLD)
    claims.learned(0.7)
    assert claims.size == POOL_FIRST
    for _ in range(300):
        claims.learned(0.0)
    assert claims.whole


def test_a_step_has_what_its_stage_says_and_is_reproducible():
    for stage in STAGES:
        one, two = (lessons(WORLD, Random("x"), stage, Claims(WORLD)) for _ in range(2))
        assert one == two
        said = {k: len(v) for k, v in one.items()}
        wanted = {kind: getattr(stage, kind) for kind in ("claims", "opinions", "interviews", "objects")}
        assert said == {kind: n for kind, n in wanted.items() if n}


def test_the_first_stage_agrees_with_every_user():
    said = lessons(WORLD, Random(0), STAGES[0], Claims(WORLD))["opinions"]
    assert all(answer in prompt for prompt, answer in said)
