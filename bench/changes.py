"""What got faster or slower between two sets of results, beyond their noise.

python -m bench.changes before.json after.json [--all]
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lorasb_kernels.profiling.results import Results, read_all
from lorasb_kernels.utils.tables import markdown_table
from lorasb_kernels.utils.timing import median


@dataclass(frozen=True)
class Change:
    """One timing in both sets.

    Args:
        name: what was timed.
        before: median in microseconds of the first set.
        after: of the second.
        noise: relative; changes below it are not significant.
    """

    name: str
    before: float
    after: float
    noise: float

    @property
    def relative(self) -> float:
        """after / before − 1."""
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        """`"faster"`, `"slower"` or `""` if the noise is larger than the change."""
        if abs(self.relative) <= self.noise:
            return ""
        return "faster" if self.relative < 0 else "slower"


@dataclass(frozen=True)
class _Timing:
    """Medians of repeated runs and the widest spread within one, both in microseconds."""

    medians: list[float]
    spread: float

    @property
    def noise(self) -> float:
        """Relative: half the 10 % to 90 % range within a run, or the range between runs."""
        centre = median(self.medians)
        between = max(self.medians) - min(self.medians)
        return max(self.spread / 2, between) / centre


def changes(before: Sequence[Results], after: Sequence[Results]) -> list[Change]:
    """The timings that both sets have, largest relative change first.

    Each set may hold several runs of the same code on the same GPU: their spread then counts
    as noise, in addition to the spread within each run.

    Raises:
        ValueError: sets of different or mixed GPUs, or without a timing in common.
    """
    gpus = {results.environment.gpu for results in (*before, *after)}
    if len(gpus) != 1:
        raise ValueError(f"results are of {sorted(gpus)}; expected those of one GPU")
    old, new = _timings(before), _timings(after)
    common = [key for key in old if key in new]
    if not common:
        raise ValueError("the results have no timing in common")
    found = [
        Change(
            name=_name(key),
            before=median(old[key].medians),
            after=median(new[key].medians),
            noise=math.hypot(old[key].noise, new[key].noise),
        )
        for key in common
    ]
    return sorted(found, key=lambda change: -abs(change.relative))


def _timings(runs: Sequence[Results]) -> dict[tuple, _Timing]:
    quantiles = defaultdict(lambda: defaultdict(list))
    for results in runs:
        for row in results.select(quantity="time"):
            quantiles[(*row.case, row.contender)][row.quantile].append(row.value)
    return {
        key: _Timing(
            values["p50"],
            max(high - low for low, high in zip(values["p10"], values["p90"], strict=True)),
        )
        for key, values in quantiles.items()
    }


def _name(key: tuple) -> str:
    op, shape, tokens, r, dtype, contender = key
    sizes = [f"M={tokens}"] * bool(tokens) + [f"r={r}"] * bool(r)
    return " ".join([op, shape, *sizes, dtype, f"[{contender}]"])


def changes_table(found: Sequence[Change], all_rows: bool = False) -> str:
    """A Markdown table of the changes beyond noise, or of all."""
    shown = [change for change in found if all_rows or change.verdict]
    quiet = len(found) - sum(bool(change.verdict) for change in found)
    rows = [
        (
            change.name,
            f"{change.before:.1f}",
            f"{change.after:.1f}",
            f"{change.relative:+.1%}",
            f"±{change.noise:.1%}",
            change.verdict,
        )
        for change in shown
    ]
    header = ("timing", "before µs", "after µs", "change", "noise", "")
    table = markdown_table(header, rows) + "\n\n" if rows else ""
    return f"{table}{quiet} of {len(found)} timings did not change beyond noise"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of changes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", help="results file, or a folder of runs of the same code")
    parser.add_argument("after", help="likewise")
    parser.add_argument("--all", action="store_true", help="show changes within noise too")
    options = parser.parse_args(arguments)
    try:
        found = changes(read_all(options.before), read_all(options.after))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(changes_table(found, options.all))


__all__ = ["Change", "changes", "changes_table", "main"]

if __name__ == "__main__":
    main()
