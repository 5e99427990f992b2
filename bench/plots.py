"""Plots of the newest results of a GPU; a plot whose numbers are missing is not drawn."""

from collections.abc import Sequence
from pathlib import Path

from bench.headline import WORDS, multiples
from bench.recording import folder_name
from lorasb_kernels.profiling.results import Results, Row
from lorasb_kernels.utils.figures import Styles, new_figure, save_png


def draw_plots(found: Results, folder: str | Path) -> list[Path]:
    """Draws the plots that the results have numbers for; returns the PNG files, in `folder`."""
    files, styles = [], Styles()
    for name, draw in PLOTS.items():
        figure, axes = new_figure(size=(7.5, 4.5))
        if draw(found, axes, styles):
            where = found.environment
            figure.text(
                0.995, 0.005, f"{where.gpu}, {where.date[:10]}", ha="right", fontsize="x-small"
            )
            files.append(Path(folder) / f"{folder_name(where.gpu)}-{name}.png")
            save_png(figure, files[-1])
    return files


def _ratios(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows of timed contenders with their time over that of `frozen` in the same case."""
    bound = {row.case: row.value for row in rows if row.contender == "frozen"}
    return [
        (row, row.value / bound[row.case])
        for row in rows
        if row.contender != "frozen" and row.case in bound
    ]


def headline(found: Results, axes, styles: Styles) -> bool:
    """The table that `make gpu` prints, as bars: a block over the frozen block."""
    columns = multiples(found)
    names = [name for name in WORDS if any(name in timed for timed in columns.values())]
    names = [name for name in names if name != "frozen"]
    if not names:
        return False
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        shown = [(x, timed[name][1]) for x, timed in enumerate(columns.values()) if name in timed]
        places = [x + (i - len(names) / 2 + 0.5) * width for x, _ in shown]
        heights = [height for _, height in shown]
        bars = axes.bar(places, heights, width, label=WORDS[name], color=styles.color(name))
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set(ylabel="time over the frozen block", title="forward and backward, r = 96")
    axes.legend(fontsize="small")
    return True


def overhead_over_tokens(found: Results, axes, styles: Styles) -> bool:
    """Forward and backward of a block over the frozen block, by tokens."""
    rows = found.select(op="block.both", quantity="time", quantile="p50")
    lines: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    for row, ratio in _ratios(rows):
        case = lines.setdefault((row.shape, row.r), {})
        case.setdefault(row.contender, []).append((row.tokens, ratio))
    if not lines:
        return False
    (shape, r), contenders = max(
        lines.items(), key=lambda item: max(len(points) for points in item[1].values())
    )
    for name, points in contenders.items():
        style = styles.line(name, r)
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel="time over frozen", title=f"{shape}, r = {r}, both passes")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    return True


def bars_by_shape(found: Results, axes, styles: Styles) -> bool:
    """Forward and backward over the frozen layer, by shape, at the most tokens."""
    rows = [
        row
        for op in ("linear.both", "block.both")
        for row in found.select(op=op, quantity="time", quantile="p50")
    ]
    pairs = _ratios(rows)
    if not pairs:
        return False
    tokens = max({row.tokens for row, _ in pairs}, key=lambda M: _shapes_at(pairs, M))
    rank = max(row.r for row, _ in pairs if row.tokens == tokens)
    chosen = [(row, ratio) for row, ratio in pairs if (row.tokens, row.r) == (tokens, rank)]
    shapes = list(dict.fromkeys(row.shape for row, _ in chosen))
    names = list(dict.fromkeys(row.contender for row, _ in chosen))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = {row.shape: ratio for row, ratio in chosen if row.contender == name}
        places = [shapes.index(shape) + (i - len(names) / 2 + 0.5) * width for shape in heights]
        axes.bar(places, list(heights.values()), width, label=name, color=styles.color(name))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes, fontsize="x-small")
    axes.set(ylabel="time over frozen", title=f"M = {tokens}, r = {rank}, both passes")
    axes.legend(fontsize="x-small", ncols=2)
    return True


def _shapes_at(pairs: Sequence[tuple[Row, float]], tokens: int) -> int:
    return len({row.shape for row, _ in pairs if row.tokens == tokens})


def roofline(found: Results, axes, styles: Styles) -> bool:
    """Achieved rate of each kernel over its flops per byte, under the measured ceilings."""
    ceilings = {row.quantity: row.value for row in found.select(op="ceiling", dtype="bfloat16")}
    kernels = [row for row in found.select(quantity="rate") if row.op.startswith("kernel.")]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in kernels:
        value = found.beside(row)
        if value.get("flops"):
            intensity = value["flops"] / value["bytes"]
            points.setdefault(row.contender, []).append((intensity, row.value))
    if not points or len(ceilings) < 2:
        return False
    for name, pairs in points.items():
        axes.scatter(*zip(*pairs, strict=True), s=14, label=name, color=styles.color(name))
    ridge = 1e3 * ceilings["rate"] / ceilings["bandwidth"]  # flops per byte
    axes.plot(
        [ridge / 256, ridge, ridge * 16],
        [ceilings["rate"] / 256, ceilings["rate"], ceilings["rate"]],
        color="black",
        linewidth=1,
    )
    axes.set(xlabel="flops per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axes.set_title("kernels under the measured roofline")
    axes.legend(fontsize="small")
    return True


def memory(found: Results, axes, styles: Styles) -> bool:
    """What forward keeps for backward, by contender, in the case with the most tokens."""
    rows = found.select(quantity="saved_memory")
    if not rows:
        return False
    largest = max(rows, key=lambda row: (row.op.startswith("block"), row.tokens, row.r))
    chosen = [row for row in rows if row.case == largest.case]
    _horizontal_bars(chosen, axes, styles)
    axes.set(xlabel="MB kept for backward")
    axes.set_title(f"{largest.shape}, M = {largest.tokens}, r = {largest.r}")
    return True


def init_time(found: Results, axes, styles: Styles) -> bool:
    """Seconds of a whole model's initialization, by contender."""
    rows = found.select(op="init.model", quantity="time", quantile="p50")
    if not rows:
        return False
    _horizontal_bars(rows, axes, styles)
    axes.set(xlabel="seconds", title=f"initialization, {rows[0].shape}, r = {rows[0].r}")
    return True


def _horizontal_bars(rows: Sequence[Row], axes, styles: Styles) -> None:
    """A bar per contender, the first on top, in millionths of the rows' unit."""
    names = [row.contender for row in rows]
    colors = [styles.color(name) for name in names]
    axes.barh(names, [row.value / 1e6 for row in rows], color=colors)
    axes.invert_yaxis()


PLOTS = {
    "headline": headline,
    "overhead": overhead_over_tokens,
    "shapes": bars_by_shape,
    "roofline": roofline,
    "memory": memory,
    "init": init_time,
}

__all__ = ["draw_plots"]
