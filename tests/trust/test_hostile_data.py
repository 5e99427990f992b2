"""Broken, badly encoded or malicious training data gives usable rows or a DataError."""

import csv
import io
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorasb_kernels.train.data import read_examples, read_labelled
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.rows import MAX_LINE
from tests.trust.conftest import LITTLE, MUCH
from tests.trust.watching import bounded_memory, tree, watched

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "\x00", "9" * 5000, "../../x", "__import__('os')", "1e999"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
columns = st.sampled_from(
    ["instruction", "response", "input", "choices", "text", "label", "output", "answer", "sentence"]
)
rows = st.dictionaries(columns | st.just("text_pair") | st.text(max_size=8), values, max_size=6)
good_row = st.fixed_dictionaries(
    {"instruction": st.text(min_size=1), "response": st.text(min_size=1), "text": st.just("x")}
)


def as_json(row) -> bytes:
    return json.dumps(row).encode()


def as_csv(table) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "response", "choices", "text", "label"])
    writer.writeheader()
    for row in table:
        writer.writerow({name: row.get(name, "") for name in writer.fieldnames})
    return text.getvalue().encode("utf-8", "replace")


lines = (rows | good_row).map(as_json) | st.binary(max_size=60) | st.just(b"[" * 2000)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "shift-jis"])


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A suffix and the bytes of a file."""
    if draw(st.booleans()):
        content = draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"\x00\n"])).join(
            draw(st.lists(lines, max_size=5))
        )
        suffix = draw(st.sampled_from([".jsonl", ".json"]))
        if suffix == ".json" and draw(st.booleans()):
            content = b"[" + b",".join(draw(st.lists(lines, max_size=5))) + b"]"
    else:
        content, suffix = as_csv(draw(st.lists(rows | good_row, max_size=4))), ".csv"
    content = content.decode("utf-8", "replace").encode(draw(encodings), "replace")
    cut = draw(st.integers(0, len(content)) | st.just(len(content)))
    return suffix, content[:cut] + draw(st.binary(max_size=8) | st.just(b""))


READERS = {
    "examples": read_examples,
    "labels": read_labelled,
    "scores": lambda path: read_labelled(path, regression=True),
}


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory):
    """What the readers import at their first call."""
    for suffix in (".jsonl", ".json", ".csv"):
        path = tmp_path_factory.mktemp("warm") / f"rows{suffix}"
        path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
        with pytest.raises(DataError):
            read_labelled(path)


def check(folder, reader, suffix, content):
    folder = folder / "rows"
    folder.mkdir(exist_ok=True)
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    before = tree(folder)
    found, message = [], str(path)
    with watched():
        try:
            found = READERS[reader](path)
        except DataError as error:
            message = str(error)
    assert str(path) in message
    assert len(message) < 1000
    for row in found:  # what a tokenizer takes
        for value in vars(row).values():
            if isinstance(value, str):
                value.encode("utf-8")
    assert tree(folder) == before


@settings(LITTLE)
@given(st.sampled_from(sorted(READERS)), files())
@example("examples", (".jsonl", b'{"instruction": "a", "response": "b", "choices": 5}'))
@example("examples", (".jsonl", b"[" * 200_000))
@example("examples", (".jsonl", b'{"instruction": "\\ud800", "response": "b"}'))
@example("examples", (".jsonl", b'{"instruction": ' + b"9" * 5000 + b"}"))
@example("examples", (".jsonl", b'\xff\xfe{"instruction"'))
@example("labels", (".jsonl", b'{"text": "a", "label": 1' + b"0" * 400 + b"}"))
@example("labels", (".jsonl", b'{"text": "a", "label": 1e300}'))
@example("labels", (".csv", b"text,label\n" + b"x" * 200_000 + b",1\n"))
@example("labels", (".csv", b"text,label\na\x00b,1\n"))
@example("examples", (".json", b"[" * 200_000))
@example("examples", (".json", b'[{"instruction": "a", "output": 1, "answer": []}]'))
def test_rows_or_a_named_error(tmp_path_factory, reader, file):
    check(tmp_path_factory.getbasetemp(), reader, *file)


@pytest.mark.slow
@settings(MUCH)
@given(st.sampled_from(sorted(READERS)), files())
def test_ten_thousand_files(tmp_path_factory, reader, file):
    check(tmp_path_factory.getbasetemp(), reader, *file)


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "a", "response": "b"}\n')
    assert read_examples(path)[0].instruction == "a"


def test_a_class_index_allocates_no_head_of_its_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 4000000000}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: label is 4000000000; expected"):
        read_labelled(path)


def test_an_enormous_row_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # sparse: 8 GB of NUL on one line
    with (
        bounded_memory(8 * MAX_LINE >> 20),
        pytest.raises(DataError, match=r":1: a line of more than"),
    ):
        read_examples(path)
