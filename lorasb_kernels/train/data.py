"""Training rows, read from JSONL or CSV and checked."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lorasb_kernels.train.errors import DataError, shown

MAX_LINE = 1 << 24  # characters; bounds the memory that a file without line ends takes
MAX_CLASSES = 1 << 16  # limits the size of the head that a class index requires


@dataclass(frozen=True)
class Example:
    """An instruction and its response; `choices` are the possible answers."""

    instruction: str
    response: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """A text (or a pair of texts) and its label: a class index, or a score to regress on."""

    text: str
    label: int | float
    text_pair: str | None = None


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a `.jsonl` or `.csv` file, in UTF-8, with their line numbers.

    Raises:
        DataError: no such file, another suffix or encoding, a line that does not parse or is
            longer than `MAX_LINE`, no rows.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"data is {str(path)!r}; expected a file ending in .jsonl or .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _lines(path, file)
            if path.suffix == ".csv":
                reader = csv.DictReader(lines)
                rows = [(reader.line_num, row) for row in reader]
            else:
                rows = [
                    (i, _object(path, i, line)) for i, line in enumerate(lines, 1) if line.strip()
                ]
    except OSError as error:
        raise DataError(f"data is {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE} characters")
        yield line


def _object(path: Path, line_number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise DataError(f"{path}:{line_number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line_number}: expected an object, not {type(row).__name__}")
    return row


def read_examples(path: str | Path) -> list[Example]:
    """Instruction/response rows; an `input` column, when filled, follows the instruction.

    `choices` is a list (JSONL) or a text separated by `|` (CSV).

    Raises:
        DataError: see `read_rows`; a row without instruction or response, or whose response
            is not one of its choices.
    """
    examples = []
    for line, row in read_rows(path):
        instruction, response = (_text(path, line, row, key) for key in ("instruction", "response"))
        if row.get("input"):
            instruction = f"{instruction}\n{_text(path, line, row, 'input')}"
        choices = _choices(path, line, row)
        if choices and response not in choices:
            raise DataError(
                f"{path}:{line}: response {shown(response)} is none of {shown(choices)}"
            )
        examples.append(Example(instruction, response, choices))
    return examples


def _choices(path: str | Path, line: int, row: dict[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices") or ()
    if isinstance(choices, str):
        choices = choices.split("|")
    if not isinstance(choices, (list, tuple)) or not all(
        isinstance(choice, (str, int, float)) and _is_unicode(str(choice)) for choice in choices
    ):
        raise DataError(f"{path}:{line}: choices is {shown(choices)}; expected a list of texts")
    return tuple(map(str, choices))


def read_labelled(path: str | Path, regression: bool = False) -> list[Labelled]:
    """Text/label rows, with an optional `text_pair`.

    Raises:
        DataError: see `read_rows`; a row without text, or a label that is not a class index
            (for regression: not a number).
    """
    rows = []
    for line, row in read_rows(path):
        try:
            score = float(row["label"])
        except (KeyError, TypeError, ValueError, OverflowError):
            score = math.nan
        is_class = 0 <= score < MAX_CLASSES and score.is_integer()
        if not (math.isfinite(score) if regression else is_class):
            expected = "a number" if regression else f"a class index 0, 1, … {MAX_CLASSES - 1}"
            label = shown(row.get("label"))
            raise DataError(f"{path}:{line}: label is {label}; expected {expected}")
        pair = _text(path, line, row, "text_pair") if row.get("text_pair") else None
        label = score if regression else int(score)
        rows.append(Labelled(_text(path, line, row, "text"), label, pair))
    return rows


def _text(path: str | Path, line: int, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value or not _is_unicode(value):
        raise DataError(f"{path}:{line}: {key} is {shown(value)}; expected a text")
    return value


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can contain but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
