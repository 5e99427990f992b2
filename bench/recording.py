"""From samples to rows of the results database and pytest-benchmark's `extra_info`."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasb_kernels.profiling.costs import Cost, total
from lorasb_kernels.profiling.results import COLUMNS, FORMAT, Environment, Row, read
from lorasb_kernels.profiling.roofline import Ceilings
from lorasb_kernels.utils.files import write_text
from lorasb_kernels.utils.timing import quantiles


@dataclass(frozen=True)
class Case:
    """What is measured; the fields of `results.Row` that say so."""

    op: str
    shape: str
    tokens: int
    r: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """What one contender took for a case.

    Args:
        samples: seconds, one for each repetition.
        launches: the bytes and flops that the operation needs; empty if none are counted.
        peak: peak bytes of device memory beyond the operands; None if unknown.
        saved: bytes kept for backward; None if it does not apply.
        others: further rows as (quantity, value, unit).
    """

    samples: Sequence[float]
    launches: Sequence[Cost] = ()
    peak: int | None = None
    saved: int | None = None
    others: Sequence[tuple[str, float, str]] = field(default=())


def rows(case: Case, contender: str, measured: Measurement, ceilings: Ceilings | None) -> list[Row]:
    """The rows of a measurement: time, rates, share of the roofline, memory."""
    times = quantiles(measured.samples)
    seconds = times["p50"]
    numbers = [("time", name, 1e6 * value, "us") for name, value in times.items()]
    if measured.launches:
        needed = total(measured.launches)
        numbers += [
            ("bandwidth", "p50", needed.bytes / seconds / 1e9, "GB/s"),
            ("rate", "p50", needed.flops / seconds / 1e12, "TFLOP/s"),
            ("bytes", "", needed.bytes, "bytes"),
            ("flops", "", needed.flops, "flops"),
        ]
        if ceilings is not None:
            share = ceilings.floor(measured.launches) / seconds
            numbers.append(("roofline_share", "p50", share, "1"))
    for quantity, value in (("peak_memory", measured.peak), ("saved_memory", measured.saved)):
        if value is not None:
            numbers.append((quantity, "", value, "bytes"))
    numbers += [(quantity, "", value, unit) for quantity, value, unit in measured.others]
    return [
        Row(
            **vars(case),
            contender=contender,
            quantity=quantity,
            quantile=quantile,
            value=float(f"{value:.6g}"),
            unit=unit,
        )
        for quantity, quantile, value, unit in numbers
    ]


class ReplayClock:
    """The clock that pytest-benchmark reads: it advances by durations measured before.

    pytest-benchmark times one callable with a host clock. The durations here come from device
    events of interleaved contenders; replaying them gives its statistics, tables and files.
    """

    def __init__(self):
        self.now = 0.0
        self._durations = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, durations: Sequence[float]) -> None:
        """The durations of the calls of `advance` to come."""
        self._durations = iter(durations)

    def advance(self) -> None:
        """What is "timed": lets the next duration pass."""
        self.now += next(self._durations)


def folder_name(gpu: str) -> str:
    """The name of a device as that of a folder or file."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def file_of(folder: str | Path, environment: Environment) -> Path:
    """The file of the results of `environment` in the database `folder`."""
    date, commit = environment.date[:10], environment.commit.replace("+", "-changed")
    return Path(folder) / folder_name(environment.gpu) / f"{date}-{commit}.json"


def write(folder: str | Path, environment: Environment, rows: Iterable[Row]) -> Path:
    """Adds rows to the file of `environment` in the database `folder`, atomically.

    An existing row with the same key is replaced, so parts of a run can be repeated.

    Returns:
        The file.
    """
    path = file_of(folder, environment)
    known = {row.key: row for row in read(path).rows} if path.exists() else {}
    known |= {row.key: row for row in rows}
    header = {
        "format": FORMAT,
        "environment": dataclasses.asdict(environment),
        "columns": COLUMNS,
    }
    lines = [json.dumps(dataclasses.astuple(row), allow_nan=False) for row in known.values()]
    head = json.dumps(header, indent=1).removesuffix("\n}")
    write_text(path, head + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")
    return path


__all__ = ["Case", "Measurement", "ReplayClock", "file_of", "folder_name", "rows", "write"]
