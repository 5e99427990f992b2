"""How the figures look: one colour per method and one line style per rank, in all of them."""

from itertools import cycle
from pathlib import Path

from lorasb_kernels.utils.files import replacing

COLORS = {
    "lora-sb": "#1f77b4",
    "lora-xs": "#ff7f0e",
    "lora": "#2ca02c",
    "rslora": "#8c564b",
    "lora-one": "#9467bd",
    "pissa": "#e377c2",
    "dora": "#bcbd22",
    "full": "#333333",
}
# For everything else (ablations, contenders of a benchmark), in the order of appearance.
SPARE_COLORS = [
    "#17becf",
    "#d62728",
    "#7f7f7f",
    "#393b79",
    "#637939",
    "#8c6d31",
    "#843c39",
    "#7b4173",
    "#9ecae1",
    "#fdae6b",
    "#a1d99b",
    "#bcbddc",
    "#e7969c",
    "#cedb9c",
    "#e7cb94",
    "#de9ed6",
]
LINE_STYLES = {8: "--", 16: "-", 32: ":", 64: "-.", 96: (0, (6, 1)), 128: (0, (3, 1, 1, 1, 1, 1))}
SPARE_LINE_STYLES = ((0, (1, 3)), (0, (8, 4)), (0, (8, 2, 2, 2)), (0, (5, 1, 1, 1)))


class Styles:
    """The colours and line styles of one figure.

    Known methods and ranks look the same in every figure. Others take what is spare, in the order
    in which they are asked for; after 16 methods or 4 ranks the spare ones repeat.
    """

    def __init__(self):
        self.colors, self.lines = dict(COLORS), dict(LINE_STYLES)
        self.spare_colors, self.spare_lines = cycle(SPARE_COLORS), cycle(SPARE_LINE_STYLES)

    def color(self, method: str) -> str:
        """The colour of a method."""
        if method not in self.colors:
            self.colors[method] = next(self.spare_colors)
        return self.colors[method]

    def line(self, method: str, r: int | None = None) -> dict:
        """Keyword arguments of `axes.plot`; solid for a method without a rank."""
        if r is not None and r not in self.lines:
            self.lines[r] = next(self.spare_lines)
        return {
            "color": self.color(method),
            "linestyle": "-" if r is None else self.lines[r],
        }


def new_figure(columns: int = 1, size: tuple[float, float] = (7, 4.2)):
    """A matplotlib figure of `size` inches and its axes, `columns` side by side, with a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150)
    axes = figure.subplots(1, columns)
    for one in figure.axes:
        one.grid(alpha=0.3)
    return figure, axes


def save_png(figure, path: str | Path) -> None:
    """Writes a figure as PNG, completely or not at all."""
    figure.tight_layout()
    with replacing(path) as building:
        figure.savefig(building, format="png")
