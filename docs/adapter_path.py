"""Draws docs/figures/adapter_path.svg, the picture of the README: `python docs/adapter_path.py`.

A schematic, not a measurement and not to scale: one layer's matrices in forward and backward,
grouped by the operation that reads and writes them.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

FILE = Path(__file__).with_name("figures") / "adapter_path.svg"

FROZEN, TRAINED, ACTIVATION, KEPT = "#cfd8e3", "#f28e2b", "#ffffff", "#8cc98c"
EDGE, GROUP, TEXT = "#3c4650", "#9aa5b1", "#20262c"
WIDE, LONG, THIN, TOKENS = 1.6, 1.0, 0.2, 0.9  # drawn: activations, weights, r and M


def matrix(axes, x: float, y: float, width: float, height: float, label: str, color: str) -> None:
    """A matrix centred on (x, y), its label below."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor=EDGE, linewidth=1))
    axes.text(x, y - height / 2 - 0.1, label, ha="center", va="top", fontsize=9, color=TEXT)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": EDGE, "lw": 1.1})


def group(axes, x0: float, x1: float, y0: float, y1: float, label: str) -> None:
    """A dashed frame around what one operation does."""
    box = FancyBboxPatch((x0, y0), x1 - x0, y1 - y0, boxstyle="round,pad=0,rounding_size=0.15")
    box.set(facecolor="none", edgecolor=GROUP, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.add_patch(box)
    axes.text(x0 + 0.12, y1 + 0.08, label, ha="left", va="bottom", fontsize=9, color=TEXT)


def row(axes, y: float, names: dict[str, str], operations: tuple[str, str], depth: float) -> None:
    """One pass, from left to right.

    Args:
        axes: to draw on.
        y: height of the adapter's path; the frozen product runs above it.
        names: labels of the matrices by their role.
        operations: labels of the two operations.
        depth: how far below y the first operation reaches.
    """
    top = y + 1.45
    matrix(axes, 0.9, y + 0.85, WIDE, TOKENS, names["in"], ACTIVATION)
    matrix(axes, 3.2, y, THIN, LONG, names["first"], FROZEN)
    matrix(axes, 4.4, y, THIN, TOKENS, names["low"], KEPT if "h" in names["low"] else ACTIVATION)
    matrix(axes, 5.5, y, THIN, THIN, names["core"], TRAINED)
    matrix(axes, 6.45, y, THIN, TOKENS, names["scaled"], ACTIVATION)
    matrix(axes, 8.3, y, LONG, THIN, names["last"], FROZEN)
    matrix(axes, 8.3, top, LONG, 0.85 * LONG, names["frozen"], FROZEN)
    matrix(axes, 11.3, y + 0.85, WIDE, TOKENS, names["out"], ACTIVATION)
    axes.text(9.8, y + 0.85, "+", ha="center", va="center", fontsize=15, color=TEXT)
    arrow(axes, (1.75, y + 1.15), (7.7, top))
    arrow(axes, (1.75, y + 0.55), (3.0, y + 0.1))
    for start, end in ((3.4, 4.2), (4.6, 5.3), (5.7, 6.25), (6.65, 7.7)):
        arrow(axes, (start, y), (end, y))
    arrow(axes, (8.9, top - 0.1), (9.65, y + 1.0))
    arrow(axes, (8.9, y + 0.05), (9.65, y + 0.7))
    arrow(axes, (9.95, y + 0.85), (10.4, y + 0.85))
    group(axes, 2.75, 7.15, y - depth, y + 0.75, operations[0])
    group(axes, 7.45, 10.15, y - 0.95, y + 2.1, operations[1])


def draw(path: Path) -> None:
    """Writes the picture as SVG, the same bytes each time."""
    style = {
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "svg.fonttype": "none",
        "svg.hashsalt": "adapter path",
    }
    with rc_context(style):
        figure = Figure(figsize=(7.0, 4.91))
        axes = figure.subplots()
        row(
            axes,
            4.05,
            {
                "in": "x  [M, n]",
                "first": "A",
                "low": "h = x Aᵀ",
                "core": "R",
                "scaled": "p = s·h Rᵀ",
                "last": "B",
                "frozen": "W",
                "out": "y  [M, m]",
            },
            ("shrink: reads x once", "expand"),
            depth=0.95,
        )
        row(
            axes,
            0.2,
            {
                "in": "dy  [M, m]",
                "first": "B",
                "low": "g = dy B",
                "core": "R",
                "scaled": "q = s·g R",
                "last": "A",
                "frozen": "W",
                "out": "dx  [M, n]",
            },
            ("core_backward: reads dy once", "expand"),
            depth=1.4,
        )
        axes.add_patch(Rectangle((4.6, -1.02), THIN, THIN, facecolor=TRAINED, edgecolor=EDGE))
        axes.text(4.95, -0.92, "dR = s·gᵀ h  [r, r]", va="center", fontsize=9, color=TEXT)
        axes.text(-0.1, 6.4, "forward", fontsize=11, weight="bold", color=TEXT)
        axes.text(-0.1, 2.55, "backward", fontsize=11, weight="bold", color=TEXT)
        legend = (
            (FROZEN, "frozen"),
            (TRAINED, "trained R and its gradient, fp32"),
            (KEPT, "kept for backward"),
        )
        for i, (color, label) in enumerate(legend):
            x = (1.6, 3.5, 8.6)[i]
            axes.add_patch(Rectangle((x, -1.85), 0.3, 0.2, facecolor=color, edgecolor=EDGE))
            axes.text(x + 0.45, -1.75, label, ha="left", va="center", fontsize=9, color=TEXT)
        axes.set(xlim=(-0.15, 12.25), ylim=(-1.95, 6.75), aspect="equal")
        axes.axis("off")
        figure.subplots_adjust(0, 0, 1, 1)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(FILE)
