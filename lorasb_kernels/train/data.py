"""Training rows, read from JSONL or CSV and checked."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_kernels.train.errors import DataError


@dataclass(frozen=True)
class Example:
    """An instruction and its response; `choices` are the answers it may be."""

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
    """Rows of a `.jsonl` or `.csv` file with their line numbers.

    Raises:
        DataError: no such file, another suffix, a line that does not parse, no rows.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"data is {str(path)!r}; expected a file ending in .jsonl or .csv")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                rows = [(reader.line_num, row) for row in reader]
            else:
                rows = [
                    (i, _object(path, i, line)) for i, line in enumerate(file, 1) if line.strip()
                ]
    except OSError as error:
        raise DataError(f"data is {str(path)!r}: {error.strerror}") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _object(path: Path, line_number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{line_number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line_number}: expected an object, not {type(row).__name__}")
    return row


def read_examples(path: str | Path) -> list[Example]:
    """Instruction/response rows; an `input` column, when filled, follows the instruction.

    `choices` is a list (JSONL) or a text separated by `|` (CSV).

    Raises:
        DataError: see `read_rows`; a row without instruction or response, or whose response
            is none of its choices.
    """
    examples = []
    for line, row in read_rows(path):
        instruction, response = (_text(path, line, row, key) for key in ("instruction", "response"))
        if row.get("input"):
            instruction = f"{instruction}\n{_text(path, line, row, 'input')}"
        choices = row.get("choices") or ()
        choices = tuple(choices.split("|") if isinstance(choices, str) else map(str, choices))
        if choices and response not in choices:
            raise DataError(f"{path}:{line}: response {response!r} is none of {choices}")
        examples.append(Example(instruction, response, choices))
    return examples


def read_labelled(path: str | Path, regression: bool = False) -> list[Labelled]:
    """Text/label rows, with an optional `text_pair`.

    Raises:
        DataError: see `read_rows`; a row without text, or a label that is no class index
            (no number, for regression).
    """
    rows = []
    for line, row in read_rows(path):
        try:
            score = float(row["label"])
        except (KeyError, TypeError, ValueError):
            score = math.nan
        if not (math.isfinite(score) if regression else score >= 0 and score.is_integer()):
            expected = "a number" if regression else "a class index 0, 1, …"
            raise DataError(f"{path}:{line}: label is {row.get('label')!r}; expected {expected}")
        pair = _text(path, line, row, "text_pair") if row.get("text_pair") else None
        label = score if regression else int(score)
        rows.append(Labelled(_text(path, line, row, "text"), label, pair))
    return rows


def _text(path: str | Path, line: int, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{path}:{line}: {key} is {value!r}; expected a text")
    return value
