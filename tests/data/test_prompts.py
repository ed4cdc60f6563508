from __future__ import annotations

import pickle

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tomoscope.data import TASKS, Prompt, as_prompt, mark
from tomoscope.errors import DataError, PromptError, TokenizerError

GIVEN = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


def test_parse_takes_the_braces_out() -> None:
    prompt = Prompt.parse("The {subject:Space Needle} is in")
    assert prompt.text == str(prompt) == "The Space Needle is in"
    assert prompt.spans == {"subject": (4, 16)}
    assert prompt.words("subject") == "Space Needle"
    assert prompt.marked() == "The {subject:Space Needle} is in"


def test_braces_escape_and_colons_are_kept() -> None:
    prompt = Prompt.parse("a {{b}} {x:1{{2}}: 3}")
    assert prompt.text == "a {b} 1{2}: 3"
    assert prompt.words("x") == "1{2}: 3"


@pytest.mark.parametrize(
    "marked",
    ["{a:b", "a}", "{a:}", "{:b}", "{b}", "{a:x} {a:y}", "{a:{b:c}}", "{1a:b}", "{a b:c}", "{}", "{a.b:c}", "{{a:b}"],
)
def test_bad_marks_are_told(marked: str) -> None:
    with pytest.raises(PromptError, match=r"\{label:words\}|its own label"):
        Prompt.parse(marked)


@GIVEN
@given(parts=st.lists(st.tuples(TEXT, TEXT.filter(bool)), max_size=4), tail=TEXT)
@example(parts=[("", "0")], tail="}")
@example(parts=[("{", "}"), ("", "{0}")], tail="{}")
def test_marked_and_parse_are_inverse(parts: list[tuple[str, str]], tail: str) -> None:
    text, spans = "", {}
    for i, (before, words) in enumerate(parts):
        spans[f"s{i}"] = (len(text) + len(before), len(text) + len(before) + len(words))
        text += before + words
    text += tail
    if not text:
        return
    prompt = Prompt(text, spans)
    if any(text[end : end + 1] == "}" for _, end in spans.values()):
        with pytest.raises(PromptError, match="closing brace"):
            prompt.marked()
        return
    back = Prompt.parse(prompt.marked())
    assert back == prompt
    assert hash(back) == hash(prompt)
    assert pickle.loads(pickle.dumps(prompt)) == prompt


@pytest.mark.parametrize("spans", [{"a": (0, 0)}, {"a": (2, 1)}, {"a": (-1, 2)}, {"a": (0, 99)}, {"a b": (0, 1)}])
def test_spans_outside_the_text_are_refused(spans: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(PromptError):
        Prompt("text", spans)


def test_an_empty_prompt_is_refused() -> None:
    for make in (lambda: Prompt(""), lambda: as_prompt(""), lambda: as_prompt([]), lambda: Prompt.parse("")):
        with pytest.raises(PromptError, match=r"empty|no tokens"):
            make()


def test_a_text_without_tokens_is_refused(word_level) -> None:
    word_level_bare = word_level.__class__(tokenizer_object=word_level.backend_tokenizer, unk_token="[UNK]")
    word_level_bare.backend_tokenizer.post_processor = None
    try:
        with pytest.raises(PromptError, match="gives no tokens"):
            Prompt("   ").encode(word_level_bare)
    finally:
        from tokenizers import processors

        word_level.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )


def test_ids_are_the_tokenizers_own(any_tokenizer) -> None:
    text = "So the teacher gave a ring to Mary."
    assert list(Prompt(text).encode(any_tokenizer).ids) == any_tokenizer(text).input_ids


def test_spans_count_tokens_that_carry_the_leading_space(byte_bpe, metaspace_bpe) -> None:
    for tokenizer in (byte_bpe, metaspace_bpe):
        encoded = Prompt.parse("When {IO:Mary} and {S:John} went").encode(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(encoded.ids))
        first, last = encoded.spans["IO"]
        assert last == first + 1
        assert tokens[first].endswith("Mary")
        assert tokens[encoded.spans["S"][0]].endswith("John")


@GIVEN
@given(
    before=TEXT, words=st.text(st.sampled_from("aé日🎉 👩‍👩‍👧z"), min_size=1, max_size=6).filter(str.strip), after=TEXT
)
def test_spans_cover_the_bytes_of_their_words(byte_bpe, before: str, words: str, after: str) -> None:
    """Oracle: byte-level tokens spell the text's bytes, so the byte range of the span gives its tokens."""
    prompt = Prompt(before + words + after, {"x": (len(before), len(before) + len(words))})
    encoded = prompt.encode(byte_bpe)
    lengths = [len(token) for token in byte_bpe.convert_ids_to_tokens(list(encoded.ids))]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    start, end = len(before.encode()), len((before + words).encode())
    first = next(i for i, stop in enumerate(ends) if stop > start)
    last = next(i for i, stop in enumerate(ends) if stop >= end)
    assert encoded.spans["x"] == (first, last + 1)


@GIVEN
@given(words=st.text(st.sampled_from("éß日本🎉🇩🇪x"), min_size=1, max_size=5))
def test_unicode_spans_do_not_reach_their_neighbours(any_tokenizer, words: str) -> None:
    prompt = Prompt(f"So the {words} . teacher", {"x": (7, 7 + len(words)), "noun": (len(words) + 10, len(words) + 17)})
    encoded = prompt.encode(any_tokenizer)
    assert encoded.spans["x"][1] <= encoded.spans["noun"][0]
    assert encoded.spans["noun"][0] < encoded.spans["noun"][1] <= len(encoded)


def test_special_tokens_belong_to_no_span(word_level) -> None:
    encoded = Prompt.parse("{x:the teacher}").encode(word_level)
    assert encoded.spans["x"] == (1, 3)
    assert len(encoded) == 4


def test_a_span_that_covers_no_token_is_told(word_level) -> None:
    with pytest.raises(PromptError, match="covers no token"):
        Prompt.parse("the{gap: }teacher").encode(word_level)


def test_tokens_given_are_kept(byte_bpe) -> None:
    prompt = as_prompt([5, 6, 7])
    assert prompt.encode(byte_bpe).ids == (5, 6, 7)
    with pytest.raises(PromptError, match="no spans"):
        Prompt("abc", {"a": (0, 1)}, tokens=(1,))


def test_slow_tokenizers_take_texts_but_no_spans() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    assert Prompt("a bc").encode(Slow()).ids == (1, 2)
    with pytest.raises(PromptError, match="offsets"):
        Prompt.parse("a {x:bc}").encode(Slow())


def test_mark_finds_words() -> None:
    assert mark("Vinson Massif is in", [("subject", "Vinson Massif")]).spans == {"subject": (0, 13)}
    with pytest.raises(PromptError, match="is not in"):
        mark("Vinson Massif is in", [("subject", "Everest")])
    with pytest.raises(PromptError, match="has no span"):
        Prompt("a").words("subject")
    with pytest.raises(PromptError, match="overlaps"):
        Prompt("abc", {"a": (0, 2), "b": (1, 3)}).marked()


def test_a_tokenizer_that_knows_nothing_of_a_text_says_so():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(TokenizerError, match="can't read 'b'"):
        Prompt("b").encode(tokenizer)
    with pytest.raises(DataError, match="0 of 28"):
        TASKS["facts"].make(tokenizer, 8)
    with pytest.raises(TokenizerError, match="can't read"):
        TASKS["greater_than"].make(tokenizer, 8)
