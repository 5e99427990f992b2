"""Rows from JSONL and CSV, and errors that name the line."""

import json

import pytest

from lorasb_kernels.train.data import read_examples, read_labelled
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Example, Labelled


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
        Example("Add.", "3", input="1 2"),
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
        (
            "a.jsonl",
            '{"instruction": "x"}',
            "a.jsonl:1: fields ['instruction']; expected format instruction: instruction, response",
        ),
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


@pytest.mark.parametrize("label", ["-1", "1.5", "yes", "", "nan", "inf", "1_0", "１", "true"])
def test_labels_are_class_indices(tmp_path, label):
    path = write(tmp_path, "a.csv", f"text,label\nx,{label}\n")
    with pytest.raises(DataError, match=r"a\.csv:2: label is .*; expected a class index"):
        read_labelled(path)


@pytest.mark.parametrize("label", [True, "true", "1_0", "１", [1], None])
def test_labels_of_json_are_numbers(tmp_path, label):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "x", "label": label}))
    for regression in (False, True):
        with pytest.raises(DataError, match=r"a\.jsonl:1: label is .*; expected a"):
            read_labelled(path, regression)


QUESTION = "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
COMMONSENSE = {"instruction": QUESTION, "input": "", "output": "it is answer2", "answer": "answer2"}
CHOICES = ("answer1", "answer2")
DISTRIBUTED = [  # a row as it is distributed, and what it means
    ({"query": "q", "response": "r", "type": "GSM_Rephrased"}, Example("q", "r")),
    ({"question": "q", "answer": "so\n#### 7"}, Example("q", "so\n#### 7")),
    ({"problem": "p", "solution": "s", "level": "Level 1"}, Example("p", "s")),
    (COMMONSENSE, Example(QUESTION, "it is answer2", CHOICES, "", "answer2")),
    ({"instruction": "p", "output": "s", "type": "algebra"}, Example("p", "s")),
    ({"sentence": "s", "label": 1, "idx": 0}, Labelled("s", 1)),
    ({"sentence1": "s", "sentence2": "t", "label": 0}, Labelled("s", 0, "t")),
    ({"question": "s", "sentence": "t", "label": 0}, Labelled("s", 0, "t")),
    ({"question1": "s", "question2": "t", "label": 0}, Labelled("s", 0, "t")),
    ({"premise": "s", "hypothesis": "t", "label": 2}, Labelled("s", 2, "t")),
]


@pytest.mark.parametrize(("row", "meaning"), DISTRIBUTED)
def test_the_papers_data_are_read_as_they_are_distributed(tmp_path, row, meaning):
    read = read_labelled if isinstance(meaning, Labelled) else read_examples
    assert read(write(tmp_path, "a.json", json.dumps([row, row]))) == [meaning, meaning]


def test_a_row_of_another_format_is_named_with_the_fields_expected(tmp_path):
    rows = [{"query": "q", "response": "r"}, {"question": "q", "answer": "#### 1"}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    expected = r"a\.jsonl:2: query is None; expected a text \(format metamath: query, response\)"
    with pytest.raises(DataError, match=expected):
        read_examples(path)
    with pytest.raises(DataError, match=r"a\.jsonl:1: fields .*expected format text: text, label"):
        read_labelled(path)
    with pytest.raises(DataError, match=r"a\.jsonl:1: question is None.*format gsm8k"):
        read_examples(path, "gsm8k")
    with pytest.raises(DataError, match="data_format is 'text'; expected one of this task's"):
        read_examples(path, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "answer3"}, "answer 'answer3' is none of"),
        ({"output": "the first"}, "does not name the answer"),
        ({"instruction": "Which?"}, "none of .*'Answer format:'"),
    ],
)
def test_commonsense_rows_that_name_no_choice_are_refused(tmp_path, changes, message):
    path = write(tmp_path, "a.json", json.dumps([COMMONSENSE | changes]))
    with pytest.raises(DataError, match=message):
        read_examples(path)


def test_candidates_are_the_response_with_each_choice():
    example = Example("q", "not answer1 but answer2", CHOICES, answer="answer2")
    assert example.candidates() == ["not answer1 but answer1", "not answer1 but answer2"]
    assert Example("q", "yes", ("yes", "no")).candidates() == ["yes", "no"]


def test_lora_one_takes_gsm_rows_without_the_stated_answer(tmp_path):
    rows = [
        {"query": "a", "response": "b\n#### 7\nThe answer is: 7", "type": "GSM_SV"},
        {"query": "c", "response": "d", "type": "MATH_SV"},
    ]
    path = write(tmp_path, "a.json", json.dumps(rows * 3))
    assert read_examples(path, "metamath-gsm") == [Example("a", "b\n#### 7")] * 3
    assert read_examples(path, "metamath-gsm", limit=2) == [Example("a", "b\n#### 7")] * 2
    assert len(read_examples(path, limit=5)) == 5
    with pytest.raises(DataError, match="holds no row that data_format 'metamath-gsm' takes"):
        read_examples(write(tmp_path, "b.json", json.dumps(rows[1:])), "metamath-gsm")


def test_scores_are_finite_numbers(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nx,inf\n")
    with pytest.raises(DataError, match="expected a number"):
        read_labelled(path, regression=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl.*No such file"):
        read_examples(tmp_path / "none.jsonl")
