"""What a person looks at after a run: the table of runs, and loss curves as PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lorasb_kernels.train.run import Result
from lorasb_kernels.utils.files import replacing

Curve = Sequence[tuple[int, float]]


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


def plot_losses(curves: dict[str, Curve], path: Path, title: str, window: int = 8) -> None:
    """Draws loss over steps, one line a run: raw values pale, their running mean strong.

    Args:
        curves: (step, loss) points by the name of the run.
        path: PNG to write.
        title: above the axes.
        window: steps of the running mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    for name, curve in curves.items():
        steps, losses = zip(*curve, strict=True)
        smooth = [
            sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
            for i in range(len(losses))
        ]
        (line,) = axes.plot(steps, smooth, label=name, linewidth=1.8)
        if len(curves) == 1:
            axes.plot(steps, losses, color=line.get_color(), alpha=0.3, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with replacing(path) as building:
        figure.savefig(building, format="png")
    pyplot.close(figure)
