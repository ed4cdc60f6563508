"""Tables of texts with labels, good and bad."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tomoscope.data import load_labelled
from tomoscope.errors import DataError

ROWS = [{"statement": f"Statement number {i}.", "label": i % 2, "who": f"s{i // 2}"} for i in range(20)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0]), *[mark.join("" if v is None else str(v) for v in row.values()) for row in rows]]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_is_the_same(tmp_path, suffix):
    data = load_labelled(write(tmp_path / f"some{suffix}", ROWS), cluster="who")
    assert data.texts[3] == "Statement number 3."
    assert data.classes == ("0", "1")
    np.testing.assert_array_equal(data.labels, [i % 2 for i in range(20)])
    assert data.clusters[2:4] == ("s1", "s1")
    assert len(data.take([1, 5])) == 2


def test_words_and_numbers_as_labels(tmp_path):
    rows = [{"text": f"t{i}", "class": ["True", "false", "true"][i % 3]} for i in range(12)]
    assert load_labelled(write(tmp_path / "a.jsonl", rows)).classes == ("false", "true")
    rows = [{"text": f"t{i}", "y": i / 10} for i in range(12)]
    data = load_labelled(write(tmp_path / "b.jsonl", rows), numeric=True)
    assert data.numeric
    assert data.labels[3] == 0.3
    rows = [{"text": f"t{i}", "label": float(i % 3)} for i in range(24)]
    assert load_labelled(write(tmp_path / "c.parquet", rows)).classes == ("0", "1", "2")


def changed(**some):
    return [row | {k: v(i) for k, v in some.items()} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (changed(label=lambda i: None if i == 3 else i % 2), {}, "1 of 20 rows have no label under 'label' .row 4."),
        (changed(label=lambda i: 1), {}, "every label is '1'"),
        (changed(label=lambda i: int(i == 0)), {}, "the class '1' has 1 of 20 rows"),
        (changed(label=lambda i: ["good", "bad"][i % 2], statement=lambda i: f"{i} is {['good', 'bad'][i % 2]}"), {},
         "says its own label"),
        (changed(statement=lambda i: "the same"), {}, "twice, with two labels"),
        (changed(statement=lambda i: "" if i == 2 else f"t{i}"), {}, "row 3: no text"),
        (changed(label=lambda i: f"c{i}" if i else "x"), {}, "the class"),
        (ROWS[:3], {}, "3 rows, and 8 are needed"),
        (ROWS, {"label": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        (ROWS, {"cluster": "what"}, "no column 'what'"),
        (changed(text=lambda i: "t"), {}, "several columns that could hold the texts"),
        ([{"a": "x", "b": 1}] * 9, {}, "no column with a usual name for texts"),
        (changed(label=lambda i: "a"), {"numeric": True}, "is no number"),
        (changed(label=lambda i: 2.0), {"numeric": True}, "every label is 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_says_so(tmp_path, rows, options, said):
    with pytest.raises(DataError, match=said):
        load_labelled(write(tmp_path / "bad.jsonl", rows), **options)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        load_labelled(tmp_path / "none.csv")
    with pytest.raises(DataError, match="no kind that is read"):
        load_labelled(tmp_path / "some.xlsx")
    (tmp_path / "bad.jsonl").write_text("{}\nno\n")
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_labelled(tmp_path / "bad.jsonl")
    (tmp_path / "bad.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_labelled(tmp_path / "bad.csv")
    (tmp_path / "more.csv").write_text("text,label\na,1,2\n")
    with pytest.raises(DataError, match="more fields"):
        load_labelled(tmp_path / "more.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="whole Parquet"):
        load_labelled(tmp_path / "bad.parquet")


def test_what_is_learned_too_easily_is_noted(tmp_path):
    rows = [{"text": f"text {i % 30}", "label": int(i % 30 < 4)} for i in range(60)]
    notes = load_labelled(write(tmp_path / "some.jsonl", rows)).notes
    assert any("stand twice" in note for note in notes)
    assert any("imbalanced" in note for note in notes)


def test_statements_of_others(material):
    data = load_labelled(material / "statements" / "truth_is_universal" / "cities.csv", cluster="city")
    assert len(data) > 1000
    assert set(np.bincount(data.labels)) <= {len(data) // 2, len(data) - len(data) // 2}
