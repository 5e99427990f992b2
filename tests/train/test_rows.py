"""Files in their forms, and strict CSV: a row is read whole or named."""

import json

import pytest

from lorasb_kernels.train.data import read_labelled
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.rows import read_rows

ROWS = [{"a": 1, "b": "x\ny"}, {"a": 2, "b": "z"}]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.json", "\n " + json.dumps(ROWS, indent=1)),
    ],
)
def test_lines_and_arrays_are_the_same_rows(tmp_path, name, text):
    assert read_rows(write(tmp_path, name, text)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_csv_keeps_lines_within_quotes_and_their_numbers(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\r\n1,"x\ny"\r\n\r\n2,z\r\n')
    assert read_rows(path) == [(2, {"a": "1", "b": "x\ny"}), (5, {"a": "2", "b": "z"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nx,1\n" + '"y,0\n' + "z,1\n" * 98, r"a\.csv:3: not CSV: unexpected end"),
        ('text,label\nx,1\n"y"z,0\n', r"a\.csv:3: not CSV"),
        ("text,label\nx,1\nly,ric,1\n", r"a\.csv:3: 3 cells; expected 2"),
        ("text,label\nx,1\ny\n", r"a\.csv:3: 1 cells; expected 2"),
        ("text,label,text\nx,1,y\n", r"a\.csv:1: column 'text' twice"),
    ],
)
def test_a_csv_that_would_lose_cells_or_rows_is_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path, "a.csv", text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"a": 1}, 2]', r"a\.json:2: expected an object, not int"),
        ("a.json", '[{"a": 1},', "not JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.parquet", "no table", "a.parquet"),
    ],
)
def test_arrays_and_tables_that_cannot_be_read_are_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, text))


def test_an_array_is_measured_before_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(2 << 30)  # sparse
    with pytest.raises(DataError, match="an array of 2147483648 bytes; expected at most"):
        read_rows(path)


@pytest.mark.parametrize("source", ["hub:", "hub:a/b", "hub:a:b:c:d"])
def test_a_source_on_the_hub_names_its_split(source):
    with pytest.raises(DataError, match="expected hub:<name>:<split>"):
        read_rows(source)


@pytest.mark.slow
def test_a_folder_of_parquet_files_is_read_as_the_hub_is(tmp_path):
    pytest.importorskip("datasets")  # comes with trl, in `make test-full`
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"sentence": f"film {i}", "label": i % 2, "idx": i} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = read_labelled(f"hub:{tmp_path}:train[1:4]")
    assert [row.text for row in found] == ["film 1", "film 2", "film 3"]
    assert read_labelled(tmp_path / "train.parquet")[1:4] == found
    with pytest.raises(DataError, match="hub:"):
        read_rows(f"hub:{tmp_path}:nothing")
