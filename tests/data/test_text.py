from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomoscope.data import Corpus
from tomoscope.errors import DataError

TEXTS = ["one two", "three 🎉 été", 'four "five", [six]', "seven\\eight"]


def _write(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"texts.{kind}"
    content = {
        "txt": "\n\n\n".join(texts) + "\n",
        "jsonl": "\n".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) for t in texts) + "\n\n",
        "json": json.dumps(texts, indent=2),
    }
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), path)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(content[kind.removesuffix(".gz")].encode()))
    else:
        path.write_text(content[kind], encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet", "txt.gz", "jsonl.gz", "json.gz"])
def test_every_kind_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    corpus = Corpus(_write(tmp_path, kind, TEXTS))
    found = list(corpus.documents())
    assert [document.text for document in found] == TEXTS
    assert [document.index for document in found] == [0, 1, 2, 3]
    assert all(f"texts.{kind}:" in document.source for document in found)
    assert [document.text for document in corpus.documents(start=2)] == TEXTS[2:]
    assert [d.index for d in Corpus(corpus.source, limit=3).documents(start=1)] == [1, 2]


def test_a_directory_is_read_in_order_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.jsonl").write_text('"second"\n""\n"third"\n')
    (tmp_path / "a.txt").write_text("first\nline")
    (tmp_path / "notes.md").write_text("not read")
    corpus = Corpus(tmp_path)
    assert [document.text for document in corpus.documents()] == ["first\nline", "second", "third"]
    assert len(corpus.files()) == 2


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30)), indent=st.sampled_from([None, 1])
)
def test_json_lists_stream_as_json_loads_reads_them(tmp_path: Path, values: list[str], indent: int | None) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    expected = [value for value in json.loads(path.read_text(encoding="utf-8")) if value.strip()]
    assert [document.text for document in Corpus(path).documents()] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "x.jsonl, line 2: no field 'text'. It has 'body'"),
        ("x.jsonl", b'{"text": 3}\n', "x.jsonl, line 1: int where a text should be"),
        ("x.jsonl", b'"a"\n"\xff"\n', "x.jsonl, line 2: not UTF-8"),
        ("x.txt", b"a\n\n\xc3\n", "x.txt, line 3: not UTF-8"),
        ("x.json", b'["a", "b"', "x.json, item 2: not JSON, or the file is cut short"),
        ("x.json", b'["a", "b', "x.json, item 1: not JSON, or the file is cut short"),
        ("x.json", b'["a" "b"]', "x.json, item 1: not JSON"),
        ("x.json", b'["a", "\xff"]', "not UTF-8"),
        ("x.json", b'{"a": 1}', "not a JSON list"),
        ("x.json", b"", "not a JSON list"),
        ("x.json", b'["a", 3]', "x.json, item 1: int where a text"),
        ("x.txt.gz", gzip.compress(b"some text that is long enough\n" * 50, mtime=0)[:-12], "not a whole gzip file"),
        ("x.jsonl.gz", b"not gzip at all", "not a whole gzip file"),
        ("x.parquet", b"PAR1 and no more", "not a whole Parquet file"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=None) as caught:
        list(Corpus(tmp_path / name).documents())
    assert message in str(caught.value)


def test_truncated_parquet_and_missing_columns(tmp_path: Path) -> None:
    path = _write(tmp_path, "parquet", TEXTS)
    with pytest.raises(DataError, match="no column 'body'"):
        list(Corpus(path, field="body").documents())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        list(Corpus(path).documents())


def test_nothing_to_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or directory"):
        Corpus(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no file or directory"):
        Corpus("some/deep/path")
    with pytest.raises(DataError, match="holds no text"):
        Corpus(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match="no known kind"):
        Corpus(tmp_path / "x.csv")
    with pytest.raises(DataError, match="at least one"):
        Corpus(tmp_path, limit=0)


def test_hub_sets_need_the_package_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"tomoscope\[hub\]"):
        list(Corpus("owner/name").documents())


def test_hub_sets_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
            if name != "owner/name":
                raise FileNotFoundError(name)
            assert split == "test"
            assert streaming
            return [{"body": "a"}, {"body": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert [d.text for d in Corpus("owner/name", field="body", split="test").documents()] == ["a", "b"]
    with pytest.raises(DataError, match="the hub gives no data set"):
        list(Corpus("owner/other").documents())


def test_packed_rows_hold_every_token_in_order(tmp_path: Path, byte_bpe) -> None:
    corpus = Corpus(_write(tmp_path, "jsonl", [f"So the teacher {i} " + "ring " * (i % 7) for i in range(200)]))
    rows = list(corpus.pack(byte_bpe, 16))
    expected, owners = [], []
    for document in corpus.documents():
        tokens = [*byte_bpe(document.text).input_ids, byte_bpe.eos_token_id]
        expected += tokens
        owners += [document.index] * len(tokens)
    whole = len(expected) - len(expected) % 16
    assert np.concatenate([row.ids for row in rows]).tolist() == expected[:whole]
    assert np.concatenate([row.documents for row in rows]).tolist() == owners[:whole]
    assert {row.ids.shape for row in rows} == {(16,)}


def test_packing_goes_on_from_a_document(tmp_path: Path, byte_bpe) -> None:
    corpus = Corpus(_write(tmp_path, "jsonl", [f"So the teacher {i}" for i in range(100)]))
    first = next(corpus.pack(byte_bpe, 8, start=40))
    assert first.documents[0] == 40
    assert first.ids.tolist()[:3] == byte_bpe("So the teacher 40").input_ids[:3]


def test_shuffling_is_seeded_and_loses_nothing(tmp_path: Path, byte_bpe) -> None:
    corpus = Corpus(_write(tmp_path, "jsonl", [f"{i}" for i in range(300)]))

    def order(seed: int) -> list[int]:
        rows = corpus.pack(byte_bpe, 1, seed=seed, buffer=50)
        return list(dict.fromkeys(int(row.documents[0]) for row in rows))

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(300))
    with pytest.raises(DataError, match="at least one token"):
        next(corpus.pack(byte_bpe, 0))


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_a_huge_file_streams_in_bounded_memory(tmp_path: Path, byte_bpe, kind: str) -> None:
    path = tmp_path / f"huge.{kind}"
    one = "So the teacher gave a ring to the king. " * 20
    with path.open("w") as file:
        file.write("[" if kind == "json" else "")
        for i in range(20_000):
            line = {
                "jsonl": json.dumps({"text": one}) + "\n",
                "json": ("," if i else "") + json.dumps(one),
                "txt": one + "\n\n",
            }
            file.write(line[kind])
        file.write("]" if kind == "json" else "")
    assert path.stat().st_size > 15e6
    tracemalloc.start()
    assert sum(1 for _ in Corpus(path).documents()) == 20_000
    rows = sum(1 for _ in Corpus(path, limit=500).pack(byte_bpe, 128, seed=0, buffer=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows > 500
    assert peak < 4e6
