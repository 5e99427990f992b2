"""Samples from rows: the data sets of the papers as they are distributed, and our own form.

A format is recognised by the fields of the first row, or given by name; every row must have its
fields.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.rows import NumberedRow, read_rows
from lorasb_kernels.utils.fields import shown

MAX_CLASSES = 1 << 16  # bounds the head that a class index asks for
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Example:
    """An instruction and its response.

    Args:
        instruction: what is asked.
        response: what the model learns to write.
        choices: the answers there are to choose from, where there are such.
        input: what the instruction is about, where a row gives it apart.
        answer: the choice that the response names; empty: the response itself.
    """

    instruction: str
    response: str
    choices: tuple[str, ...] = ()
    input: str = ""
    answer: str = ""

    @property
    def label(self) -> str:
        """The right one of `choices`."""
        return self.answer or self.response

    def candidates(self) -> list[str]:
        """The response as it would be for each of the choices."""
        before, _, after = self.response.rpartition(self.label)
        return [before + choice + after for choice in self.choices]


@dataclass(frozen=True)
class Labelled:
    """A text (or a pair of texts) and its label: a class index, or a score to regress on."""

    text: str
    label: int | float
    text_pair: str | None = None


class Row:
    """One row; fields that cannot be used raise DataError with its place and its format."""

    def __init__(self, source: str | Path, number: int, fields: dict[str, Any], expected: str):
        self.place, self.fields, self.expected = f"{source}:{number}", fields, expected

    def error(self, message: str) -> DataError:
        """What is wrong, with the file, the row and the fields of the format."""
        return DataError(f"{self.place}: {message} ({self.expected})")

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value or not _is_unicode(value):
            raise self.error(f"{name} is {shown(value)}; expected a text")
        return value

    def optional(self, name: str) -> str:
        """A text, empty where the row has none."""
        return self.text(name) if self.fields.get(name) else ""

    def choices(self) -> tuple[str, ...]:
        """A list (JSON) or a text separated by `|` (CSV); empty where the row has none."""
        choices = self.fields.get("choices") or ()
        if isinstance(choices, str):
            choices = choices.split("|")
        if not isinstance(choices, (list, tuple)) or not all(
            isinstance(choice, (str, int, float)) and _is_unicode(str(choice)) for choice in choices
        ):
            raise self.error(f"choices is {shown(choices)}; expected a list of texts")
        return tuple(map(str, choices))

    def number(self, name: str) -> float:
        """A number, or a text that is one in ASCII digits; NaN for anything else."""
        value = self.fields.get(name)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.nan
        return math.nan


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can contain but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Format:
    """A form of rows.

    Args:
        name: for `data_format`.
        fields: what every row has.
        convert: an `Example` or None (to leave the row out); or (text, second text) for a row
            with a label.
        by_name_only: never recognised, only asked for.
        metric: how its papers judge by such rows; None: nothing is said.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Row], Any]
    by_name_only: bool = False
    metric: str | None = None

    def __str__(self):
        return f"format {self.name}: {', '.join(self.fields)}"


def _own(row: Row) -> Example:
    choices, response = row.choices(), row.text("response")
    if choices and response not in choices:
        raise row.error(f"response {shown(response)} is none of {shown(choices)}")
    return Example(row.text("instruction"), response, choices, row.optional("input"))


def _commonsense(row: Row) -> Example:
    instruction, output, answer = (row.text(n) for n in ("instruction", "output", "answer"))
    _, found, listed = instruction.rpartition("Answer format:")
    choices = tuple(choice.strip() for choice in listed.split("/")) if found else ()
    if answer not in choices:
        raise row.error(
            f"answer {shown(answer)} is none of {shown(choices)}, after 'Answer format:'"
        )
    if answer not in output:
        raise row.error(f"output {shown(output)} does not name the answer {shown(answer)}")
    return Example(instruction, output, choices, row.optional("input"), answer)


def _alpaca(row: Row) -> Example:
    return Example(row.text("instruction"), row.text("output"), input=row.optional("input"))


def _metamath_gsm(row: Row) -> Example | None:
    """LoRA-One's selection: the rows made from GSM8K, without their line 'The answer is:'."""
    if "GSM" not in row.text("type"):
        return None
    return Example(row.text("query"), row.text("response").split("\nThe answer is:")[0])


def _pair(instruction: str, response: str) -> Callable[[Row], Example]:
    return lambda row: Example(row.text(instruction), row.text(response))


def _texts(first: str, second: str | None = None) -> Callable[[Row], tuple[str, str | None]]:
    return lambda row: (row.text(first), row.text(second) if second else None)


EXAMPLE_FORMATS = (
    Format("instruction", ("instruction", "response"), _own),
    Format("metamath", ("query", "response"), _pair("query", "response")),
    Format("metamath-gsm", ("query", "response", "type"), _metamath_gsm, by_name_only=True),
    Format("gsm8k", ("question", "answer"), _pair("question", "answer"), metric="numeric"),
    Format("math", ("problem", "solution"), _pair("problem", "solution"), metric="math"),
    Format("commonsense", ("instruction", "output", "answer"), _commonsense, metric="answer"),
    Format("alpaca", ("instruction", "output"), _alpaca, metric="math"),
)
LABELLED_FORMATS = (
    Format(
        "text",
        ("text", "label"),
        lambda row: (row.text("text"), row.optional("text_pair") or None),
    ),
    Format("glue-mnli", ("premise", "hypothesis", "label"), _texts("premise", "hypothesis")),
    Format("glue-qnli", ("question", "sentence", "label"), _texts("question", "sentence")),
    Format("glue-qqp", ("question1", "question2", "label"), _texts("question1", "question2")),
    Format("glue-pair", ("sentence1", "sentence2", "label"), _texts("sentence1", "sentence2")),
    Format("glue-sentence", ("sentence", "label"), _texts("sentence")),
)
FORMATS = tuple(format.name for format in (*EXAMPLE_FORMATS, *LABELLED_FORMATS))


def _rows_of(
    source: str | Path, formats: Iterable[Format], name: str | None
) -> Iterator[tuple[Row, Format]]:
    """The rows of a source with the format they are in."""
    rows = read_rows(source)
    format = _format_of(source, rows[0], formats, name)
    for number, fields in rows:
        yield Row(source, number, fields, str(format)), format


def _format_of(
    source: str | Path, first: NumberedRow, formats: Iterable[Format], name: str | None
) -> Format:
    number, row = first
    for format in formats:
        if format.name == name:
            return format
        if name is None and not format.by_name_only and row.keys() >= set(format.fields):
            return format
    known = "; ".join(map(str, formats))
    if name is not None:
        raise DataError(f"data_format is {shown(name)}; expected one of this task's: {known}")
    raise DataError(f"{source}:{number}: fields {shown(sorted(map(str, row)))}; expected {known}")


def metric_of(source: str | Path) -> str | None:
    """How the papers judge by the examples of a source; None where its form does not say.

    Raises:
        DataError: see `read_examples`.
    """
    return _format_of(source, read_rows(source)[0], EXAMPLE_FORMATS, None).metric


def read_examples(
    source: str | Path, data_format: str | None = None, limit: int | None = None
) -> list[Example]:
    """Instructions and responses.

    Args:
        source: as for `read_rows`.
        data_format: one of `EXAMPLE_FORMATS`; None: recognised by the fields of the first row.
        limit: how many to take from the beginning; None: all.

    Raises:
        DataError: see `read_rows`; fields of no known format, a row that lacks one of its
            format's, an answer that is none of the choices.
    """
    rows = (format.convert(row) for row, format in _rows_of(source, EXAMPLE_FORMATS, data_format))
    examples = list(itertools.islice((e for e in rows if e is not None), limit))
    if not examples:
        raise DataError(f"{source} holds no row that data_format {data_format!r} takes")
    return examples


def read_labelled(
    source: str | Path,
    regression: bool = False,
    data_format: str | None = None,
    limit: int | None = None,
) -> list[Labelled]:
    """Texts, or pairs of texts, each with a label; arguments as for `read_examples`.

    Raises:
        DataError: see `read_examples`; a label that is no class index (no number, for
            regression).
    """
    labelled = []
    rows = _rows_of(source, LABELLED_FORMATS, data_format)
    for row, format in itertools.islice(rows, limit):
        score = row.number("label")
        is_class = 0 <= score < MAX_CLASSES and score.is_integer()
        if not (math.isfinite(score) if regression else is_class):
            expected = "a number" if regression else f"a class index 0, 1, … {MAX_CLASSES - 1}"
            raise row.error(f"label is {shown(row.fields.get('label'))}; expected {expected}")
        text, second = format.convert(row)
        labelled.append(Labelled(text, score if regression else int(score), second))
    return labelled
