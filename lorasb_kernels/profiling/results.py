"""The results database: one long format. `bench.recording` writes it.

A file holds the results of one commit on one device on one day, `<gpu>/<date>-<commit>.json`:

    {"format": 1, "environment": {…}, "columns": […], "rows": [[…], …]}

A row is one number. `quantity` says what it is (`"time"`, `"bandwidth"`, …), `unit` its unit,
`quantile` which quantile of repeated measurements (`"p50"`); empty if there is only one.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1


@dataclass(frozen=True)
class Environment:
    """The columns of a result that are the same for a whole run.

    Args:
        gpu: the driver's name of the device, or `"cpu: <model>"`.
        driver: version of the driver; empty on a CPU.
        torch: version.
        triton: version; empty if it is not installed.
        commit: short hash, followed by `+` if the working tree differs from it; or `"unknown"`.
        date: UTC, ISO 8601 to the minute.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One number of a measurement.

    Args:
        op: what was computed, `"linear.both"`, `"kernel.shrink"`, `"train.step"`.
        shape: on what, `"mistral-7b/q_proj 4096x4096"`.
        tokens: M; 0 if it does not apply.
        r: rank; 0 if it does not apply.
        dtype: `"bfloat16"` and so on.
        contender: who computed it.
        quantity: `"time"`, `"bandwidth"`, `"rate"`, `"roofline_share"`, `"peak_memory"`,
            `"saved_memory"`, `"throughput"`, `"captured_energy"`.
        quantile: `"p10"`, `"p50"`, `"p90"` or `""`.
        value: the number.
        unit: `"us"`, `"GB/s"`, `"TFLOP/s"`, `"1"`, `"bytes"`, `"tokens/s"`.
    """

    op: str
    shape: str
    tokens: int
    r: int
    dtype: str
    contender: str
    quantity: str
    quantile: str
    value: float
    unit: str

    @property
    def case(self) -> tuple:
        """What was measured, without the contender."""
        return self.op, self.shape, self.tokens, self.r, self.dtype

    @property
    def key(self) -> tuple:
        """Everything except the number and its unit."""
        return *self.case, self.contender, self.quantity, self.quantile


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclass(frozen=True)
class Results:
    """The content of one file."""

    environment: Environment
    rows: tuple[Row, ...]

    def select(self, **columns) -> list[Row]:
        """The rows with these values in these columns."""
        return [
            row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in columns.items())
        ]

    def beside(self, row: Row) -> dict[str, float]:
        """The other quantities of the measurement that `row` belongs to; medians of several."""
        return {
            other.quantity: other.value
            for other in self.rows
            if other.case == row.case
            and other.contender == row.contender
            and other.quantile in ("", "p50")
        }


def read(path: str | Path) -> Results:
    """Reads one file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a results file, with the reason.
    """
    path = Path(path)
    content = path.read_text(encoding="utf-8")
    try:
        record = json.loads(content)
        if record["format"] != FORMAT:
            raise ValueError(f"format is {record['format']!r}; expected {FORMAT}")
        if tuple(record["columns"]) != COLUMNS:
            raise ValueError(f"columns are {record['columns']}; expected {list(COLUMNS)}")
        rows = tuple(Row(*row) for row in record["rows"])
        return Results(Environment(**record["environment"]), rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error


def read_all(path: str | Path) -> list[Results]:
    """The results in a file, or in every `<date>-<commit>.json` below a folder, oldest first.

    Raises:
        FileNotFoundError: neither a file nor a folder.
        ValueError: a file that is not a results file.
    """
    path = Path(path)
    if path.is_file():
        return [read(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a results file nor a folder of them")
    return sorted(
        (read(file) for file in path.glob("**/2*-*-*-*.json")),
        key=lambda found: found.environment.date,
    )


__all__ = [
    "COLUMNS",
    "FORMAT",
    "Environment",
    "Results",
    "Row",
    "read",
    "read_all",
]
