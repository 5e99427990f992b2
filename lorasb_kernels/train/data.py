"""Samples from rows.

A format is recognised by the fields of the first row, or given by name; every row must have its
fields.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.formats import EXAMPLE_FORMATS, LABELLED_FORMATS, Format, Row
from lorasb_kernels.train.rows import NumberedRow, read_rows
from lorasb_kernels.train.samples import Conversation, Example, Labelled
from lorasb_kernels.utils.fields import shown

MAX_CLASSES = 1 << 16  # bounds the head that a class index asks for


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
) -> list[Example | Conversation]:
    """Instructions with responses, conversations and plain texts.

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
