from __future__ import annotations

import json
from pathlib import Path

import pytest

from tomoscope.data import load_facts, load_pairs
from tomoscope.errors import DataError


def test_prompt_pairs_with_counted_words(tmp_path: Path, byte_bpe) -> None:
    entry = {"clean": "Then, Mary and John went. John gave a ring to", "answers": [" Mary"], "wrong_answers": [" John"]}
    entry["corrupt"] = "Then, Amy and Tom went. Jack gave a ring to"
    places = {"IO": 2, "IO-1": 1, "S1": 4, "S2": 7, "end": 11}
    path = tmp_path / "ioi.json"
    path.write_text(json.dumps({"word_idxs": places, "prompts": [entry]}))
    pairs = load_pairs(path)
    assert pairs.name == "ioi"
    assert {label: pairs[0].clean.words(label) for label in pairs[0].clean.spans} == {
        "IO": "Mary",
        "S1": "John",
        "S2": "John",
        "end": "to",
    }
    assert pairs[0].corrupted.words("S2") == "Jack"
    assert len(pairs.encode(byte_bpe)) == 1
    path.write_text(json.dumps({"word_idxs": {**places, "end": 14}, "prompts": [entry]}))
    assert load_pairs(path)[0].clean.spans == {}


def test_agreement_lines(tmp_path: Path) -> None:
    line = {"clean_prefix": "The dog", "patch_prefix": "The dogs", "clean_answer": " is", "patch_answer": " are"}
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps(line | {"case": "singular"}) for _ in range(3)))
    pairs = load_pairs(path, name="agreement")
    assert (len(pairs), pairs.name) == (3, "agreement")
    assert (pairs[0].answers, pairs[0].wrong, pairs[0].labels) == ((" is",), (" are",), {"case": "singular"})


def test_facts_mark_their_subjects(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "The Louvre is in", "subject": "Louvre", "attribute": "Paris"}]))
    (item,) = load_facts(path)
    assert item.prompt.spans == {"subject": (4, 10)}
    assert item.answers == (" Paris",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no pairs"),
        ('{"prompts": []}', "holds no pairs"),
        ('{"clean_prefix": "a"}', "line 1: no text under 'patch_prefix'"),
        ("not json", "line 1: not JSON"),
        ('{"prompts": [{"clean": "a", "corrupt": "b", "answers": "c"}]}', "prompt 0: answers that are no list"),
        ('{"prompts": [{"clean": "a"}]}', "prompt 0: no text under 'corrupt'"),
    ],
)
def test_bad_pairs_say_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path / "x.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a list of facts"),
        (b"[", "line 1: not JSON"),
        (b'[{"prompt": "a"}]', "fact 0: no text under 'subject'"),
        (b'[{"prompt": "a", "subject": "b", "attribute": "c"}]', "fact 0: the subject 'b' is not in 'a'"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_bad_facts_say_where(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_facts(tmp_path / "x.json")
    assert message in str(caught.value)
    with pytest.raises(DataError, match="can't be read"):
        load_facts(tmp_path / "absent.json")


def test_the_material_loads(material: Path) -> None:
    for path in sorted((material / "tasks" / "prompt_pairs").glob("*.json")):
        assert len(load_pairs(path)) == 1_000
    ioi = load_pairs(material / "tasks" / "prompt_pairs" / "ioi_BABA_template_0_prompts.json")
    assert all(pair.clean.words("S1") == pair.clean.words("S2") for pair in ioi)
    assert all(pair.answers == (f" {pair.clean.words('IO')}",) for pair in ioi)
    sizes = {path.name: len(load_pairs(path)) for path in (material / "tasks" / "agreement").glob("*.json")}
    assert sizes == {"simple_test.json": 120, "simple_train.json": 480, "within_rc_test.json": 2400}
    items = load_facts(material / "tasks" / "known_1000.json")
    assert len(items) == 1_209
    assert all(item.prompt.words("subject") in item.prompt.text for item in items)
