"""Loss curves as PNG."""

from collections.abc import Sequence
from pathlib import Path

from lorasb_kernels.utils.files import replacing

Curve = Sequence[tuple[int, float]]


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
