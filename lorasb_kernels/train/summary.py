"""For a person to read after a run: the table of runs and the loss curves."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from lorasb_kernels.train.run import Result
from lorasb_kernels.utils.figures import Styles, new_figure


def standard_error(share: float, count: int) -> float:
    """Standard error of a share measured on `count` independent rows."""
    return math.sqrt(share * (1 - share) / count)


def minutes(seconds: float) -> str:
    """Seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def runs_table(results: Sequence[Result]) -> Table:
    """One row per run: method, rank, what it trained, its losses, metric and time."""
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


def evaluation_table(found: Sequence[dict]) -> Table:
    """One row per test set, and the average where there are several that can be averaged.

    Args:
        found: `data`, `metric`, `rows` and `value` of each set.
    """
    table = Table(title="evaluation")
    table.add_column("data")
    for column in ("metric", "rows", "value"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(one["data"], one["metric"], str(one["rows"]), f"{one['value']:.4f}")
    metrics = {one["metric"] for one in found}
    if len(found) > 1 and (len(metrics) == 1 or "loss" not in metrics):
        table.add_section()
        average = statistics.mean(one["value"] for one in found)
        table.add_row("average", "", str(sum(one["rows"] for one in found)), f"{average:.4f}")
    return table


@dataclass(frozen=True)
class Curve:
    """The training loss of one run.

    Args:
        method: decides the colour.
        r: decides the line style; None for a method without a rank.
        points: (step, loss).
    """

    method: str
    r: int | None
    points: Sequence[tuple[int, float]]

    @property
    def label(self) -> str:
        """For the legend."""
        return self.method if self.r is None else f"{self.method}, r = {self.r}"


def loss_figure(curves: Sequence[Curve], title: str, window: int = 8):
    """Loss over steps: the running mean of each run; the raw values, pale, if there is one run.

    Args:
        curves: one per run.
        title: above the axes.
        window: steps of the running mean.

    Returns:
        a matplotlib figure.
    """
    figure, axes = new_figure()
    styles = Styles()
    for curve in curves:
        steps, losses = zip(*curve.points, strict=True)
        smooth = [
            sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
            for i in range(len(losses))
        ]
        style = styles.line(curve.method, curve.r)
        axes.plot(steps, smooth, label=curve.label, linewidth=1.8, **style)
        if len(curves) == 1:
            axes.plot(steps, losses, color=style["color"], alpha=0.3, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend()
    return figure
