"""The named initializations: from a layer (and its gradient signs) to A, R and B.

lora-sb      ΔW = −η·sign(Σ ∂L/∂W) ≈ U S Vᵀ     B = U, A = Vᵀ, R = S/s       (arXiv:2411.19557)
lora-xs      W ≈ U S Vᵀ                         B = U S, A = Vᵀ, R ~ N(0, σ²)  (arXiv:2405.17604)
noise        ΔW + N(0, σ²) ≈ U S Vᵀ             as lora-sb                    (ibid., table 5)
orthogonal   random orthonormal A and B, R = 0
"""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.init.estimate import estimate_updates
from lorasb_kernels.init.report import LayerReport
from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.init.svd import BATCH, truncated_svd, truncated_svd_batch
from lorasb_kernels.quantization import dense_weight


@dataclass(frozen=True)
class Adapter:
    """Initial factors of one layer, fp32: `lora_A` [r, n], `lora_R` [r, r], `lora_B` [m, r].

    `report` says how the truncated SVD went, None where there was none.
    """

    lora_A: torch.Tensor
    lora_R: torch.Tensor
    lora_B: torch.Tensor
    report: LayerReport | None = None


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one layer, whatever the order in which layers are initialized.

    Seed and name are hashed together because the CPU generator reads 32 bits of its seed.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def lora_sb(
    signs: Sequence[SignMatrix], r: int, eta: float, scaling: float, generator: torch.Generator
) -> list[Adapter]:
    """LoRA-SB: rank-r approximations of the updates `−η·signs`, B and A orthonormal.

    Args:
        signs: signs of the summed gradients of layers of one shape, [m, n].
        r: rank.
        eta: η, the step of the update.
        scaling: s.
        generator: draws the start of the SVD.
    """
    start = time.perf_counter()
    decompositions = truncated_svd_batch(signs, r, generator=generator)
    seconds = (time.perf_counter() - start) / len(signs)
    return [
        Adapter(
            svd.V.T,
            torch.diag(svd.S * (eta / scaling)),
            -svd.U,
            LayerReport.of(svd, matrix.zeros(), seconds),
        )
        for matrix, svd in zip(signs, decompositions, strict=True)
    ]


def noise(
    signs: SignMatrix,
    r: int,
    eta: float,
    scaling: float,
    noise_std: float,
    generator: torch.Generator,
) -> Adapter:
    """LoRA-SB's update with N(0, noise_std²) added to each element before the SVD."""
    noise = torch.randn(signs.shape, generator=generator) * noise_std
    update = signs.to_dense(torch.float32) * -eta + noise.to(signs.device)
    svd = truncated_svd(update, r, generator=generator)
    return Adapter(svd.V.T, torch.diag(svd.S / scaling), svd.U, LayerReport.of(svd))


def lora_xs(
    weight: torch.Tensor, r: int, core_std: float, sigma_side: str, generator: torch.Generator
) -> Adapter:
    """LoRA-XS: rank-r SVD of the weight with Σ on B or A; a small random core.

    Args:
        weight: W, [m, n].
        r: rank.
        core_std: standard deviation of R.
        sigma_side: `"B"` or `"A"`.
        generator: draws R and the start of the SVD.
    """
    svd = truncated_svd(weight.float(), r, generator=generator)
    core = torch.randn(r, r, generator=generator).to(weight.device) * core_std
    A, B = svd.V.T, svd.U
    if sigma_side == "B":
        B = B * svd.S
    else:
        A = A * svd.S[:, None]
    return Adapter(A, core, B, LayerReport.of(svd))


def orthogonal(weight: torch.Tensor, r: int, generator: torch.Generator) -> Adapter:
    """Random orthonormal A and B, R = 0."""
    m, n = weight.shape
    A, B = (torch.linalg.qr(torch.randn(k, r, generator=generator)).Q for k in (n, m))
    return Adapter(A.T, torch.zeros(r, r), B)


def _lora_sb_in_batches(
    updates: Iterable[tuple[str, SignMatrix]], config: LoRASBConfig, eta: float
) -> Iterator[tuple[str, Adapter]]:
    """Decomposes layers of one shape together; the packed signs cost little while they wait."""
    waiting: dict[torch.Size, dict[str, SignMatrix]] = {}

    def decompose(shape: torch.Size) -> Iterator[tuple[str, Adapter]]:
        layers = waiting.pop(shape)
        generator = torch.Generator().manual_seed(config.seed)
        adapters = lora_sb(list(layers.values()), config.r, eta, config.s, generator)
        return zip(layers, adapters, strict=True)

    for name, signs in updates:
        waiting.setdefault(signs.shape, {})[name] = signs
        if len(waiting[signs.shape]) == BATCH:
            yield from decompose(signs.shape)
    for shape in list(waiting):
        yield from decompose(shape)


def initialize(
    model: nn.Module,
    targets: dict[str, nn.Linear],
    config: LoRASBConfig,
    batches: Iterable | None,
    eta: float | None,
    loss_fn: Callable | None,
    progress: bool,
) -> Iterator[tuple[str, Adapter]]:
    """Yields the name and the initial adapter of each target, in any order.

    The model comes out as it went in. Arguments as for `lorasb_kernels.adapt`.
    """
    if config.init in ("lora-sb", "noise"):
        updates = estimate_updates(
            model, batches, list(targets), loss_fn=loss_fn, progress=progress
        )
        if config.init == "lora-sb":
            yield from _lora_sb_in_batches(updates, config, eta)
            return
        for name, signs in updates:
            generator = layer_generator(config.seed, name)
            yield name, noise(signs, config.r, eta, config.s, config.noise_std, generator)
        return
    for name, linear in targets.items():
        generator = layer_generator(config.seed, name)
        weight = dense_weight(linear)
        if config.init == "lora-xs":
            yield name, lora_xs(weight, config.r, config.core_std, config.sigma_side, generator)
        else:
            yield name, orthogonal(weight, config.r, generator)


__all__ = ["Adapter", "initialize", "lora_sb", "lora_xs", "noise", "orthogonal"]
