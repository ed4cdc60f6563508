from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomoscope.data import Pair, PairSet, Prompt, continuation
from tomoscope.errors import AlignmentError, DataError, PromptError


def _pair(clean: str, corrupted: str, answers=(" Mary",), wrong=(" John",)) -> Pair:
    return Pair(Prompt.parse(clean), Prompt.parse(corrupted), answers, wrong)


def test_encode_gives_ids_answers_and_spans(byte_bpe) -> None:
    aligned = PairSet([_pair("So {IO:Mary} gave a ring to", "So {IO:John} gave a ring to")]).encode(byte_bpe)
    assert list(aligned.clean_ids[0]) == byte_bpe("So Mary gave a ring to").input_ids
    assert list(aligned.corrupted_ids[0]) == byte_bpe("So John gave a ring to").input_ids
    assert aligned.spans[0] == aligned.corrupted_spans[0] == {"IO": (1, 2)}
    assert aligned.answer_ids.tolist() == [byte_bpe(" Mary").input_ids]
    assert aligned.wrong_ids.tolist() == [byte_bpe(" John").input_ids]
    assert aligned.answer_ids.dtype == np.int64
    assert len(aligned) == 1


def test_misaligned_pairs_say_where(byte_bpe) -> None:
    pairs = PairSet([_pair("So Mary", "So John"), _pair("So Mary gave", "So Xyzzyq gave")], name="mine")
    with pytest.raises(AlignmentError) as caught:
        pairs.encode(byte_bpe)
    message = str(caught.value)
    assert "Pair 1 of 'mine'" in message
    assert "has 3 tokens ['So', 'ĠMary', 'Ġgave']" in message
    assert "first differ at position 1 ('ĠMary' against" in message
    assert isinstance(caught.value, PromptError)


def test_a_prompt_that_merely_ends_sooner_is_told(byte_bpe) -> None:
    with pytest.raises(AlignmentError, match=r"position 2 \('Ġgave' against the end\)"):
        PairSet([_pair("So Mary gave", "So Mary")]).encode(byte_bpe)


def test_answers_of_several_tokens(byte_bpe) -> None:
    aligned = PairSet(
        [_pair("So Mary lives in", "So John lives in", (" Mary Reed",), (" Mary Ward", " Paris"))]
    ).encode(byte_bpe)
    assert [byte_bpe.decode(tokens) for tokens in aligned.answer_tokens[0]] == [" Mary Reed"]
    assert [len(tokens) for tokens in aligned.wrong_tokens[0]] == [2, 1]
    assert not aligned.first_tokens_suffice
    for name in ("answer_ids", "wrong_ids"):
        with pytest.raises(AlignmentError, match="begin with the same token"):
            getattr(aligned, name)


def test_pairs_with_fewer_answers_are_filled(byte_bpe) -> None:
    pairs = PairSet([_pair("So a", "So a", (" ring",), ()), _pair("So a", "So a", (" cup", " key"), (" hat",))])
    aligned = pairs.encode(byte_bpe)
    assert aligned.answer_ids[0, 1] == -1
    assert aligned.answer_ids.shape == (2, 2)
    assert aligned.wrong_ids[:, 0].tolist() == [-1, byte_bpe(" hat").input_ids[0]]


def test_an_answer_that_merges_with_the_prompt_is_told(byte_bpe) -> None:
    with pytest.raises(AlignmentError, match="merges with the end"):
        PairSet([_pair("So the ri", "So the ri", ("ng",), (" hat",))]).encode(byte_bpe)


def test_continuations_are_what_follows_in_context(any_tokenizer) -> None:
    prompt = "So the teacher that " * 20 + "gave a ring to"
    whole = any_tokenizer(prompt + " the cat", add_special_tokens=False).input_ids
    before = any_tokenizer(prompt, add_special_tokens=False).input_ids
    assert list(continuation(any_tokenizer, prompt, " the cat")) == whole[len(before) :]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(["Mary", "ring", "été", "🎉", "x1", "Zq"]), min_size=1, max_size=8))
def test_encoding_is_a_pure_function_of_the_texts(any_tokenizer, words: list[str]) -> None:
    text = "So " + " ".join(words)
    aligned = PairSet([Pair(text, text, (" ring",), (" hat",))]).encode(any_tokenizer)
    assert list(aligned.clean_ids[0]) == any_tokenizer(text).input_ids
    assert aligned.clean_ids == aligned.corrupted_ids


@pytest.mark.parametrize("answers", [(), ("",), "Mary"])
def test_bad_answers_are_refused(answers) -> None:
    with pytest.raises(PromptError):
        Pair("a", "b", answers, ())


def test_sets_behave_as_sequences() -> None:
    pairs = PairSet([Pair(f"clean {i // 2}", f"corrupted {i}", (" a",), (" b",)) for i in range(20)], name="t", seed=3)
    assert len(pairs) == len(list(pairs)) == 20
    assert isinstance(pairs[2:5], PairSet)
    assert pairs[2:5].name == "t"
    assert pairs[3].corrupted.text == "corrupted 3"
    assert pairs.clean[4].text == "clean 2"
    one, other = pairs.halves(seed=1)
    assert {p.clean.text for p in one}.isdisjoint(p.clean.text for p in other)
    assert sorted(p.corrupted.text for p in (*one, *other)) == sorted(p.text for p in pairs.corrupted)
    assert len(one) == 10
    assert one == pairs.halves(seed=1)[0] != pairs.halves(seed=2)[0]


def test_digests_follow_the_content() -> None:
    one = PairSet([Pair("a", "b", (" c",), (" d",))])
    assert one.digest() == PairSet([Pair("a", "b", (" c",), (" d",))], name="other").digest()
    assert one.digest() != PairSet([Pair("a", "b", (" c",), (" e",))]).digest()


def test_empty_sets_and_unsplittable_ones_are_refused() -> None:
    with pytest.raises(DataError, match="no pairs"):
        PairSet([])
    with pytest.raises(DataError, match="can't be split"):
        PairSet([Pair("a", "b", (" c",), ())]).halves()
