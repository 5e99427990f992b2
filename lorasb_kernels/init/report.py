"""Report of an initialization: a table, a JSON file, a plot of the captured energy."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lorasb_kernels.init.svd.truncated import TruncatedSVD
from lorasb_kernels.utils.figures import new_figure, save_png
from lorasb_kernels.utils.files import replacing

LEADING = 3  # singular values shown


@dataclass(frozen=True)
class LayerReport:
    """The initialization of one layer.

    Args:
        shape: m, n.
        r: rank.
        captured_energy: share of the squared Frobenius norm of the decomposed matrix (for LoRA-SB
            the sign matrix) that the rank-r approximation contains.
        singular_values: the leading ones.
        converged: whether the SVD reached its tolerance.
        zeros: elements of the gradient that are exactly zero; None without a gradient.
        seconds: of the SVD; its share if layers were decomposed together; None if unknown.
    """

    shape: tuple[int, int]
    r: int
    captured_energy: float
    singular_values: tuple[float, ...]
    converged: bool
    zeros: int | None = None
    seconds: float | None = None

    @classmethod
    def of(
        cls, svd: TruncatedSVD, zeros: int | None = None, seconds: float | None = None
    ) -> "LayerReport":
        """The report of a layer with the factors `svd`."""
        return cls(
            shape=(svd.U.shape[0], svd.V.shape[0]),
            r=len(svd.S),
            captured_energy=svd.report.captured_energy,
            singular_values=tuple(svd.S[:LEADING].tolist()),
            converged=svd.report.converged,
            zeros=zeros,
            seconds=seconds,
        )


@dataclass(frozen=True)
class InitReport:
    """The initialization of a model's layers, by name; `str()` gives a table."""

    layers: dict[str, LayerReport]

    @classmethod
    def of(cls, model: nn.Module) -> "InitReport":
        """The report of a model that `adapt` initialized in this process.

        Raises:
            ValueError: no layer of the model was initialized by an SVD here.
        """
        reports = {n: getattr(m, "init_report", None) for n, m in model.named_modules()}
        layers = {name: report for name, report in reports.items() if report is not None}
        if not layers:
            raise ValueError("model holds no initialization report; expected it from adapt()")
        return cls(layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]]
        rows = [("layer", "shape", "captured", "σ₁ σ₂ σ₃", "zeros", "ms")]
        rows += [_row(name, layer) for name, layer in self.layers.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:], rule, self._summary()])

    def _summary(self) -> str:
        energies = {name: layer.captured_energy for name, layer in self.layers.items()}
        lowest = min(energies, key=energies.__getitem__)
        stopped = sum(not layer.converged for layer in self.layers.values())
        return (
            f"{len(energies)} layers; captured energy {sum(energies.values()) / len(energies):.4f} "
            f"on average, least {energies[lowest]:.4f} ({lowest}); "
            f"{stopped} stopped short of the tolerance (*); "
            f"SVDs {sum(layer.seconds or 0 for layer in self.layers.values()):.2f} s"
        )

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, atomically."""
        text = json.dumps({name: asdict(layer) for name, layer in self.layers.items()}, indent=1)
        with replacing(path) as building:
            building.write_text(text)

    def plot(self, path: str | Path) -> None:
        """Draws captured energy over depth as PNG, one line for layers of the same kind."""
        figure, axes = new_figure()
        for kind, energies in self._energy_by_kind().items():
            axes.plot(range(len(energies)), energies, marker="o", markersize=3, label=kind)
        ranks = {layer.r for layer in self.layers.values()}
        title = f"captured energy at rank {', '.join(map(str, sorted(ranks)))}"
        axes.set(xlabel="depth", ylabel="captured energy", title=title, ylim=(0, 1))
        axes.legend(fontsize=7, ncols=2)
        save_png(figure, path)

    def _energy_by_kind(self) -> dict[str, list[float]]:
        """Captured energy by the last part of the layers' names, in order of depth."""
        kinds = defaultdict(list)
        for name in sorted(self.layers, key=_depth):
            kinds[name.rpartition(".")[2]].append(self.layers[name].captured_energy)
        return dict(kinds)


def _row(name: str, layer: LayerReport) -> tuple[str, ...]:
    m, n = layer.shape
    return (
        name,
        f"{m}x{n}",
        f"{layer.captured_energy:.4f}" + ("" if layer.converged else "*"),
        " ".join(f"{value:.4g}" for value in layer.singular_values),
        "" if layer.zeros is None else f"{100 * layer.zeros / (m * n):.2f} %",
        "" if layer.seconds is None else f"{1000 * layer.seconds:.1f}",
    )


def _depth(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


__all__ = ["InitReport", "LayerReport"]
