"""Tables at the end of a run."""

import math
from collections.abc import Sequence

from rich.table import Table

from lorasb_kernels.train.run import Result


def standard_error(share: float, count: int) -> float:
    """Standard error of a share measured on `count` independent rows."""
    return math.sqrt(share * (1 - share) / count)


def minutes(seconds: float) -> str:
    """Seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def runs_table(results: Sequence[Result]) -> Table:
    """One row a run: method, rank, what it trained, its losses, metric and time."""
    metric = results[0].config.evaluation
    table = Table(title="runs")
    table.add_column("method")
    for column in ("r", "trainable", "steps", "first loss", "last loss", metric):
        table.add_column(column, justify="right")
    table.add_column("init", justify="right")
    table.add_column("train", justify="right")
    for result in results:
        losses = [loss for _, loss in result.losses]
        table.add_row(
            result.config.method,
            "" if result.config.method == "full" else str(result.config.r),
            f"{result.trainable:,}",
            str(result.steps),
            f"{losses[0]:.4f}",
            f"{losses[-1]:.4f}",
            "" if result.after is None else f"{result.after:.4f}",
            minutes(result.seconds["initialize"]),
            minutes(result.seconds["train"]),
        )
    return table
