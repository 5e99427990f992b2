"""What an initialization will take, predicted from the model's shapes.

Weights are not read, so a model on the meta device is enough. Bytes are counted from shapes;
seconds are flops divided by a matrix rate, and an SVD's time scaled by size, both measured here in
a fraction of a second. The products inside attention and everything between linear layers are left
out: this is a plan, not a measurement.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.init.estimation.blocks import find_blocks
from lorasb_kernels.init.estimation.memory import accumulator_bytes
from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.init.svd.truncated import EXPECTED_PRODUCTS, truncated_svd
from lorasb_kernels.linear_layers import is_linear, matrix_shape
from lorasb_kernels.quantization import weight_dtype

CALIBRATION = 1024  # width of the matrices that rates are measured with
GRADIENT_RANK = 32


@dataclass(frozen=True)
class Rates:
    """Speed of a device: matrix flops per second; seconds of an SVD per m·n·r."""

    flops: float
    svd: float

    @classmethod
    def measure(cls, device: torch.device | str, dtype: torch.dtype, r: int) -> "Rates":
        """Times a matrix product and one truncated SVD on `device`."""
        device, size = torch.device(device), CALIBRATION
        generator = torch.Generator().manual_seed(0)
        # The signs of a sum of few outer products: a spectrum that decays like a gradient's.
        left, right = torch.randn(2, size, GRADIENT_RANK, generator=generator).to(device)
        dense = left @ right.T
        operand = dense.to(dtype)
        product = _seconds(lambda: operand @ operand, device)
        r = min(r, size // 2)
        svd = _seconds(lambda: truncated_svd(SignMatrix.from_dense(dense), r), device)
        return cls(flops=2 * size**3 / product, svd=svd / (size * size * r))

    @classmethod
    def of(cls, gpu: Gpu, dtype: str) -> "Rates":
        """A GPU's published rates, for one that is not here: products with operands of `dtype`,
        and the expected fp32 products of an SVD with A and Aᵀ, and one more, of r columns."""
        sustained = gpu.rates.tensor / gpu.tensor_rate * gpu.rate(dtype)
        products = 2 * EXPECTED_PRODUCTS + 1
        return cls(flops=sustained, svd=2 * products / gpu.fp32_rate)


@dataclass(frozen=True)
class StrategyPrediction:
    """Peak bytes beyond the model by cause, and seconds, of one strategy."""

    strategy: str
    accumulators: int
    boundaries: int
    activations: int
    seconds: float

    @property
    def total(self) -> int:
        """Peak bytes beyond the model."""
        return self.accumulators + self.boundaries + self.activations


@dataclass(frozen=True)
class InitPrediction:
    """What an initialization will take; `str()` gives a table.

    Args:
        layers: number of target layers.
        model_bytes: of the model's parameters.
        published_bytes: what the published procedure holds on the host (every gradient
            in bf16) and moves there for each micro-batch.
        svd_seconds: of all truncated SVDs, part of each strategy's seconds.
        strategies: one prediction per strategy.
    """

    layers: int
    model_bytes: int
    published_bytes: int
    svd_seconds: float
    strategies: tuple[StrategyPrediction, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.layers} target layers in a model of {_size(self.model_bytes)}; predicted peak "
            "beyond the model:",
            f"{'strategy':<10}  {'accumulators':>12}  {'boundaries':>10}  {'activations':>11}"
            f"  {'total':>9}  {'time':>9}",
        ]
        lines += [
            f"{s.strategy:<10}  {_size(s.accumulators):>12}  {_size(s.boundaries):>10}"
            f"  {_size(s.activations):>11}  {_size(s.total):>9}  {s.seconds:>7.1f} s"
            for s in self.strategies
        ]
        lines.append(
            f"of the time, {self.svd_seconds:.1f} s are SVDs; the published procedure would move "
            f"{_size(self.published_bytes)} to the host for every micro-batch"
        )
        return "\n".join(lines)


def predict_init(
    model: nn.Module,
    targets: Iterable[str],
    *,
    r: int,
    samples: int,
    tokens: int,
    micro_batch: int,
    rates: Rates,
    labelled_tokens: int | None = None,
) -> InitPrediction:
    """Predicts memory and time of LoRA-SB's initialization.

    Args:
        model: the model, on any device, meta included.
        targets: names of the layers to adapt.
        r: rank.
        samples: samples of the estimate.
        tokens: tokens of a sample.
        micro_batch: samples of a pass.
        rates: the device's; see `Rates.measure`.
        labelled_tokens: positions of a sample at which logits are computed; None for all.
    """
    targets = list(targets)
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if is_linear(m)}
    layers = {name: linears[name] for name in targets}
    blocks = find_blocks(model, targets)
    in_block = {block: _inside(linears, block) for block in blocks}
    size = weight_dtype(next(iter(layers.values()))).itemsize

    def activations(some: Iterable[nn.Module]) -> int:
        return micro_batch * tokens * size * sum(sum(matrix_shape(m)) for m in some)

    def weights(some: Iterable[nn.Module]) -> int:
        return sum(math.prod(matrix_shape(m)) for m in some)

    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = [linear for linear in linears.values() if linear is not head]
    labelled = tokens if labelled_tokens is None else labelled_tokens
    # Logits, their fp32 copy, its gradient and the gradient of the logits.
    logits = 0 if head is None else micro_batch * labelled * head.out_features * (2 * size + 8)
    of_layer = {name: accumulator_bytes(layer) for name, layer in layers.items()}
    of_block = {b: sum(v for k, v in of_layer.items() if k in in_block[b]) for b in blocks}
    outside = sum(of_layer.values()) - sum(of_block.values())
    widths = [matrix_shape(next(iter(in_block[block].values())))[1] for block in blocks]

    forward = 2 * samples * tokens * weights(body)
    if head is not None:
        forward += 2 * samples * labelled * head.in_features * head.out_features
    gradients = 2 * samples * tokens * weights(layers.values())
    svd = rates.svd * r * weights(layers.values())
    passes = (2 * forward + gradients) / rates.flops
    strategies = [
        StrategyPrediction(
            "resident", sum(of_layer.values()), 0, activations(body) + logits, passes + svd
        )
    ]
    if blocks:
        largest = max(activations(inside.values()) for inside in in_block.values())
        strategies.append(
            StrategyPrediction(
                "layerwise",
                max(of_block.values()) + outside,
                samples * tokens * size * sum(widths),
                max(largest, logits),
                passes + forward / rates.flops + svd,
            )
        )
    return InitPrediction(
        layers=len(targets),
        model_bytes=sum(p.nbytes for p in model.parameters()),
        published_bytes=2 * sum(p.numel() for p in model.parameters()),
        svd_seconds=svd,
        strategies=tuple(strategies),
    )


def _inside(linears: dict[str, nn.Module], block: str) -> dict[str, nn.Module]:
    return {name: m for name, m in linears.items() if f"{name}.".startswith(f"{block}.")}


def _seconds(work, device: torch.device) -> float:
    times = []
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


__all__ = ["InitPrediction", "Rates", "StrategyPrediction", "predict_init"]
