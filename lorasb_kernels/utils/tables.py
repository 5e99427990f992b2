"""Markdown tables that are also readable in a terminal."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with padded cells; the first column is aligned left, the others right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))


def seconds(value: float) -> str:
    """A duration in a suitable unit."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def size(value: float) -> str:
    """Bytes in a suitable decimal unit."""
    for limit, factor, unit in ((1e6, 1e-3, "kB"), (1e9, 1e-6, "MB")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e-9:.3g} GB"


__all__ = ["markdown_table", "seconds", "size"]
