"""Rows from JSONL and CSV, and errors that name the line."""

import pytest

from lorasb_kernels.train.data import Example, Labelled, read_examples, read_labelled
from lorasb_kernels.train.errors import DataError


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_examples_from_jsonl(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '{"instruction": "Add.", "input": "1 2", "response": "3"}\n\n'
        '{"instruction": "Which?", "response": "b", "choices": ["a", "b"]}\n',
    )
    assert read_examples(path) == [
        Example("Add.\n1 2", "3"),
        Example("Which?", "b", ("a", "b")),
    ]


def test_examples_from_csv(tmp_path):
    path = write(tmp_path, "a.csv", 'instruction,response,choices\n"one, two",b,a|b\n')
    assert read_examples(path) == [Example("one, two", "b", ("a", "b"))]


def test_labelled_rows(tmp_path):
    path = write(tmp_path, "a.csv", "text,label,text_pair\nx,1,\ny,0,z\n")
    assert read_labelled(path) == [Labelled("x", 1), Labelled("y", 0, "z")]
    path = write(tmp_path, "b.jsonl", '{"text": "x", "label": -0.5}')
    assert read_labelled(path, regression=True) == [Labelled("x", -0.5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "expected a file ending in .jsonl or .csv"),
        ("a.jsonl", "\n", "a.jsonl holds no rows"),
        ("a.jsonl", '{"instruction": "x", "response": "y"}\n{oops', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected an object, not list"),
        ("a.jsonl", '{"instruction": "x"}', "a.jsonl:1: response is None; expected a text"),
        ("a.jsonl", '{"instruction": 1, "response": "y"}', "instruction is 1; expected a text"),
        ("a.csv", "instruction,response\nx,y\nx,\n", "a.csv:3: response is ''"),
        (
            "a.jsonl",
            '{"instruction": "x", "response": "c", "choices": ["a", "b"]}',
            "response 'c' is none of ('a', 'b')",
        ),
    ],
)
def test_unusable_examples_are_named(tmp_path, name, text, message):
    with pytest.raises(DataError) as error:
        read_examples(write(tmp_path, name, text))
    assert message in str(error.value)


@pytest.mark.parametrize("label", ["-1", "1.5", "yes", "", "nan", "inf"])
def test_labels_are_class_indices(tmp_path, label):
    path = write(tmp_path, "a.csv", f"text,label\nx,{label}\n")
    with pytest.raises(DataError, match=r"a\.csv:2: label is .*; expected a class index"):
        read_labelled(path)


def test_scores_are_finite_numbers(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nx,inf\n")
    with pytest.raises(DataError, match="expected a number"):
        read_labelled(path, regression=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl.*No such file"):
        read_examples(tmp_path / "none.jsonl")
