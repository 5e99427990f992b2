"""How many samples an estimate needs: the gradient noise scale, measured on a few.

A layer's gradient of one sample is g = μ + ε with E ε = 0 and E‖ε‖² = σ². Its noise scale is
B = σ²/‖μ‖² (McCandlish et al., arXiv:1812.06162, section 2.2), and the gradient summed over N
samples agrees with μ, as the cosine of the angle between them, by √(N / (N + B)) on average.

Sums over micro-batches give B without bias. With G_k the gradient of micro-batch k of b_k samples,
N = Σ b_k and G = Σ G_k:

    E ‖G‖² − Σ E‖G_k‖² = (N² − Σ b_k²) ‖μ‖²        Σ E‖G_k‖² = Σ b_k² ‖μ‖² + N σ²
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasb_kernels.init.estimation import ranks
from lorasb_kernels.init.estimation.api import DEFAULTS, prepared
from lorasb_kernels.init.estimation.gradient_sums import GradientSums
from lorasb_kernels.init.estimation.options import EstimationOptions

ROWS = 64  # of each gradient, spread evenly: enough for two squared norms


@dataclass(frozen=True)
class NoiseScale:
    """The noise scale B of each layer, in samples; infinite where no mean shows in the noise."""

    by_layer: dict[str, float]

    @property
    def median(self) -> float:
        """Of the layers."""
        return torch.tensor(list(self.by_layer.values()), dtype=torch.float64).median().item()

    def agreement(self, samples: int) -> float:
        """Cosine between the gradient summed over `samples` and its mean, in the median layer."""
        return math.sqrt(samples / (samples + self.median))

    def samples(self, agreement: float) -> float:
        """How many samples agree so well with the mean: N = B · a² / (1 − a²)."""
        return self.median * agreement**2 / (1 - agreement**2)


class _RowSums(GradientSums):
    """Of a few rows of each gradient: the sum, and the squared norms of the micro-batches' sums."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__(layers)
        self.squares = {name: 0.0 for name in layers}
        self.totals: dict[str, torch.Tensor] = {}

    def _rows(self, layer: nn.Module) -> int:
        return min(super()._rows(layer), ROWS)

    def end_batch(self) -> None:
        """Adds the micro-batch to what was before it."""
        for name in self.layers:
            rows = self.pop(name)
            self.squares[name] += rows.square().sum(dtype=torch.float64).item()
            self.totals[name] = self.totals[name].add_(rows) if name in self.totals else rows

    def _add(self, name: str, dy: torch.Tensor, x: torch.Tensor) -> None:
        count = dy.shape[-1]
        kept = min(count, ROWS)
        super()._add(name, dy[..., [row * count // kept for row in range(kept)]], x)


def noise_scale(
    model: nn.Module,
    batches: Iterable[Any],
    sizes: Sequence[int],
    targets: Iterable[str],
    options: EstimationOptions = DEFAULTS,
) -> NoiseScale:
    """Measures the noise scale of each target layer, in one pass over a few samples.

    Takes the memory of a training step and `ROWS` rows of each weight. The model is unchanged.

    Args:
        model, batches, targets, options: as for `estimate_gradients`.
        sizes: samples of each batch; two batches at least on every rank.

    Raises:
        ValueError: fewer than two batches, or another number of sizes.
    """
    estimation = prepared(model, batches, targets, options)
    if len(sizes) != len(estimation.batches) or len(sizes) < 2:
        raise ValueError(
            f"sizes are of {len(sizes)} batches and there are {len(estimation.batches)}; "
            "expected the sizes of two or more"
        )
    sums = estimation.sums = _RowSums(estimation.layers)
    with estimation.step(estimation.layers):
        for index in range(len(sizes)):
            estimation.loss(index).backward()
            sums.end_batch()
    counts = torch.tensor([sum(sizes), sum(size**2 for size in sizes)], dtype=torch.float64)
    samples, squared_sizes = ranks.sum_(counts.to(estimation.device)).tolist()
    found = {}
    for name, total in sums.totals.items():
        squares = torch.tensor(sums.squares[name], dtype=torch.float64, device=total.device)
        squares = ranks.sum_(squares).item()
        square = ranks.sum_(total).square().sum(dtype=torch.float64).item()
        mean = (square - squares) / (samples**2 - squared_sizes)
        variance = (squares - squared_sizes * mean) / samples
        found[name] = max(variance, 0.0) / mean if mean > 0 else math.inf
    return NoiseScale(found)


__all__ = ["NoiseScale", "noise_scale"]
