"""In every figure a method has one colour and a rank one line style."""

import io
from itertools import product

import pytest
from matplotlib.colors import to_hex

from bench.plots import bars_by_shape, overhead_over_tokens
from bench.recording import write
from lorasb_kernels.profiling.results import read_all
from lorasb_kernels.train.summary import Curve, loss_figure
from lorasb_kernels.utils.figures import COLORS, LINE_STYLES, Styles, new_figure
from tests.bench.test_results import WHERE, everything

POINTS = [(1, 2.0), (2, 1.5), (3, 1.4)]


def drawn(*runs: tuple[str, int | None]) -> dict[tuple[str, int | None], tuple]:
    """(colour, line style) of each run's line in a figure of their losses."""
    figure = loss_figure([Curve(method, r, POINTS) for method, r in runs], "title")
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [method if r is None else f"{method}, r = {r}" for method, r in runs]
    lines = axes.get_lines()[: len(runs)]
    styles = [(line.get_color(), line._unscaled_dash_pattern) for line in lines]
    return dict(zip(runs, styles, strict=True))


def test_methods_differ_in_colour_only_and_ranks_in_line_style_only():
    methods, ranks = (*COLORS, "samples-5", "noise-1e-05"), (*LINE_STYLES, 5)
    seen = drawn(*product(methods, ranks))
    by_method = {method: {seen[method, r][0] for r in ranks} for method in methods}
    by_rank = {r: {seen[method, r][1] for method in methods} for r in ranks}
    for groups in (by_method, by_rank):
        assert all(len(group) == 1 for group in groups.values())
        assert len(set.union(*groups.values())) == len(groups)


def test_a_known_method_and_rank_look_the_same_in_every_figure():
    one = drawn(("lora", 8), ("lora-sb", 16), ("full", None))
    other = drawn(("samples-5", 5), ("lora-sb", 16), ("lora", 32))
    assert one["lora-sb", 16] == other["lora-sb", 16]
    assert one["lora", 8][0] == other["lora", 32][0]


def test_a_single_run_shows_its_raw_losses_too():
    figure = loss_figure([Curve("lora-sb", 16, POINTS)], "title", window=2)
    mean, raw = figure.axes[0].get_lines()
    assert list(mean.get_ydata()) == pytest.approx([2.0, 1.75, 1.45])
    assert list(raw.get_ydata()) == [2.0, 1.5, 1.4]
    assert mean.get_color() == raw.get_color()


def test_the_figures_of_a_benchmark_share_the_colours_of_contenders(tmp_path):
    write(tmp_path, WHERE, everything())
    (found,) = read_all(tmp_path)
    styles = Styles()
    _, lines = new_figure()
    assert overhead_over_tokens(found, lines, styles)
    _, bars = new_figure()
    assert bars_by_shape(found, bars, styles)
    line_colors = {line.get_label(): line.get_color() for line in lines.get_lines()[:-1]}
    bar_colors = {
        group.get_label(): to_hex(group.patches[0].get_facecolor()) for group in bars.containers
    }
    assert line_colors
    assert line_colors.items() <= bar_colors.items()
    assert len(set(bar_colors.values())) == len(bar_colors)
