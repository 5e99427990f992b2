"""Rows as they are stored in files or on the hub: JSON lines, a JSON array, CSV, Parquet."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lorasb_kernels.train.errors import DataError
from lorasb_kernels.utils.fields import shown

MAX_LINE = 1 << 24  # characters; bounds the memory that a file without line ends takes
MAX_ARRAY = 1 << 30  # bytes of a JSON array, which is read as a whole
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB = re.compile(r"hub:([^:]+)(?::([^:\[\]]+))?:([^:\[\]]+(?:\[.*\])?)")

NumberedRow = tuple[int, dict[str, Any]]


def read_rows(source: str | Path) -> list[NumberedRow]:
    """Rows with the number that names them: the line, or in arrays and tables the row, from 1.

    Args:
        source: a UTF-8 file of JSON lines (`.jsonl`, `.json`), of one JSON array (`.json`) or of
            comma-separated values with a header (`.csv`); a `.parquet` file; or
            `hub:<name>:<split>` or `hub:<name>:<configuration>:<split>` for a data set that the
            package `datasets` loads, such as `hub:nyu-mll/glue:cola:train[:100]`.

    Raises:
        DataError: no such file, another suffix or encoding, a line that does not parse or is
            longer than `MAX_LINE`, CSV that is not strict (an open quote, a repeated column, a
            row with more or fewer cells than the header), no rows.
    """
    if str(source).startswith("hub:"):
        rows = _hub(str(source))
    else:
        path = Path(source)
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"data is {str(path)!r}; expected a file ending in .jsonl or .csv "
                f"({', '.join(SUFFIXES)}), or hub:<name>:<split>"
            )
        rows = _parquet(path) if path.suffix == ".parquet" else _text_rows(path)
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def _text_rows(path: Path) -> list[NumberedRow]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return _csv(path, _lines(path, file))
            if path.suffix == ".json" and _is_array(file):
                return _array(path, file)
            lines = enumerate(_lines(path, file), 1)
            return [(i, _object(f"{path}:{i}", line)) for i, line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"data is {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE} characters")
        yield line


def _object(place: str, line: str) -> dict[str, Any]:
    return _as_object(place, _json(place, line))


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise DataError(f"{place}: not JSON: {error}") from error


def _as_object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, not {type(value).__name__}")
    return value


def _is_array(file: TextIO) -> bool:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    return start == "["


def _array(path: Path, file: TextIO) -> list[NumberedRow]:
    size = path.stat().st_size
    if size > MAX_ARRAY:
        raise DataError(f"{path} is an array of {size} bytes; expected at most {MAX_ARRAY}")
    values = _json(str(path), file.read())
    return [(i, _as_object(f"{path}:{i}", value)) for i, value in enumerate(values, 1)]


def _csv(path: Path, lines: Iterator[str]) -> list[NumberedRow]:
    reader = csv.reader(lines, strict=True)
    rows: list[NumberedRow] = []
    header: list[str] | None = None
    start = 1  # line at which the record being read begins
    try:
        for cells in reader:
            if not cells:
                pass  # an empty line
            elif header is None:
                header = cells
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise DataError(
                        f"{path}:{start}: column {shown(repeated[0])} twice; expected each once"
                    )
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(cells)} cells; expected {len(header)}, one a column"
                )
            else:
                rows.append((start, dict(zip(header, cells, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not CSV: {error}") from error
    return rows


def _parquet(path: Path) -> list[NumberedRow]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_datasets(path, error) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's, for files of another form, are ValueErrors
        raise DataError(f"data is {str(path)!r}: {error}") from error
    return list(enumerate(table.to_pylist(), 1))


def _hub(source: str) -> list[NumberedRow]:
    parts = _HUB.fullmatch(source)
    if not parts:
        raise DataError(
            f"data is {source!r}; expected hub:<name>:<split> or hub:<name>:<configuration>:<split>"
        )
    try:
        import datasets
    except ImportError as error:
        raise _needs_datasets(source, error) from error
    name, configuration, split = parts.groups()
    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # datasets, its hub client and its parsers raise many kinds
        raise DataError(f"data is {source!r}: {error}") from error
    return list(enumerate(loaded, 1))


def _needs_datasets(source: str | Path, error: ImportError) -> DataError:
    return DataError(
        f"data is {str(source)!r}: {error}; expected `pip install lorasb_kernels[data]`"
    )
