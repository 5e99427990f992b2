"""The named initializations: from a layer (and its gradient) to A, R and B.

lora-sb      ΔW = −η·sign(Σ ∂L/∂W) ≈ U S Vᵀ     B = U, A = Vᵀ, R = S/s       (arXiv:2411.19557)
lora-xs      W ≈ U S Vᵀ                         B = U S, A = Vᵀ, R ~ N(0, σ²)  (arXiv:2405.17604)
lora-sb-sgd  ΔW = −η·mean ∂L/∂W ≈ U S Vᵀ       as lora-sb                    (ibid., theorem 6)
noise        ΔW + N(0, σ²) ≈ U S Vᵀ             as lora-sb                    (ibid., table 5)
kaiming-svd  U(±1/√n) ≈ U S Vᵀ                  as lora-sb                    (ibid.)
scaled-b     ΔW ≈ U S Vᵀ                        B = U S, A = Vᵀ, R = 1/s      (ibid.)
random-ab    B ~ U(±1/√m), A ~ U(±1/√r), R ~ N(0, σ²)   (arXiv:2405.17604, table 3)
orthogonal   random orthonormal A and B, R = 0
lora         A ~ U(±1/√n), B = 0, no R                                        (arXiv:2106.09685)
lora-one     −mean ∂L/∂W ≈ U S Vᵀ               B = U·d, A = d·Vᵀ, no R       (arXiv:2502.01235)
             d = √(S/S₁)/√γ ("relative", the published code's) or √γ·√S ("absolute")

LoRA-GA (arXiv:2407.05000) is not among them: it subtracts the adapter's initial product from W, so
its adapters no longer fit the base model that they are saved for.
"""

import dataclasses
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.init.estimation import ranks
from lorasb_kernels.init.estimation.api import estimate_gradients, estimate_updates
from lorasb_kernels.init.estimation.losses import sample_count
from lorasb_kernels.init.estimation.options import EstimationOptions
from lorasb_kernels.init.report import LayerReport
from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.init.svd.truncated import GPU, truncated_svd, truncated_svd_batch
from lorasb_kernels.nn.linear import kaiming_uniform
from lorasb_kernels.quantization import dense_weight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Initial factors of one layer, fp32: `lora_A` [r, n], `lora_R` [r, r], `lora_B` [m, r].

    `lora_R` is None for LoRA. `report` describes the truncated SVD; None if there was none.
    """

    lora_A: torch.Tensor
    lora_R: torch.Tensor | None
    lora_B: torch.Tensor
    report: LayerReport | None = None


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one layer, independent of the order in which layers are initialized.

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


def lora_sb_sgd(
    gradient: torch.Tensor, r: int, eta: float, scaling: float, generator: torch.Generator
) -> Adapter:
    """LoRA-SB for plain gradient descent: the rank-r approximation of the update −η·gradient.

    Args:
        gradient: ∂L/∂W of the mean loss over samples, [m, n].
        r: rank.
        eta: η, the step of the update.
        scaling: s.
        generator: draws the start of the SVD.
    """
    svd = truncated_svd(-gradient, r, generator=generator)
    return Adapter(svd.V.T, torch.diag(svd.S * (eta / scaling)), svd.U, LayerReport.of(svd))


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


def kaiming_svd(
    shape: torch.Size, r: int, scaling: float, generator: torch.Generator, device: torch.device
) -> Adapter:
    """LoRA-SB's factors of a Kaiming-uniform matrix instead of the update."""
    update = kaiming_uniform(tuple(shape), generator).to(device)
    svd = truncated_svd(update, r, generator=generator)
    return Adapter(svd.V.T, torch.diag(svd.S / scaling), svd.U, LayerReport.of(svd))


def scaled_b(adapter: Adapter, scaling: float) -> Adapter:
    """The same product as `adapter`, LoRA-SB's, with the singular values in B and R = 1/s."""
    r = adapter.lora_R.shape[0]
    lora_B = scaling * adapter.lora_B @ adapter.lora_R
    identity = torch.eye(r, device=lora_B.device) / scaling
    return dataclasses.replace(adapter, lora_R=identity, lora_B=lora_B)


def orthonormal(adapter: Adapter) -> Adapter:
    """The same B·R·A with orthonormal A and B: the triangles of their QR factorizations go into R.

    The triangles have positive diagonals, so that nearly equal factors give nearly equal results.
    """
    Q_A, T_A = _qr(adapter.lora_A.T)
    Q_B, T_B = _qr(adapter.lora_B)
    core = T_B @ adapter.lora_R.double() @ T_A.T
    return dataclasses.replace(
        adapter, lora_A=Q_A.T.float(), lora_R=core.float(), lora_B=Q_B.float()
    )


def _qr(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and T of `factor` = Q T in float64, T upper triangular with a diagonal ≥ 0."""
    Q, T = torch.linalg.qr(factor.double())
    signs = torch.where(T.diagonal() < 0, -1.0, 1.0).to(T)
    return Q * signs, signs[:, None] * T


def lora(m: int, n: int, r: int, generator: torch.Generator) -> Adapter:
    """LoRA: Kaiming-uniform A, B = 0."""
    return Adapter(kaiming_uniform((r, n), generator), None, torch.zeros(m, r))


def lora_one(
    gradient: torch.Tensor, r: int, gamma: float, spectral_scaling: str, generator: torch.Generator
) -> Adapter:
    """LoRA-One: the singular subspaces of the negative gradient, the spectrum shared by A and B.

    W is unchanged: the model starts at `W + s·B·A`, which for `"absolute"` is a step of size s·γ
    along the best rank-r approximation of the negative gradient. If the gradient is zero, A and B
    are zero and stay zero.

    Args:
        gradient: ∂L/∂W of the mean loss over samples, [m, n].
        r: rank.
        gamma: γ.
        spectral_scaling: `"relative"` for √(S/S₁)/√γ each, `"absolute"` for √γ·√S.
        generator: draws the start of the SVD.
    """
    svd = truncated_svd(-gradient, r, generator=generator)
    if spectral_scaling == "relative":
        largest = svd.S[0].clamp_min(torch.finfo(svd.S.dtype).tiny)
        d = (svd.S / largest / gamma).sqrt()
    else:
        d = (svd.S * gamma).sqrt()
    return Adapter(d[:, None] * svd.V.T, None, svd.U * d, LayerReport.of(svd))


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


def random_ab(m: int, n: int, r: int, core_std: float, generator: torch.Generator) -> Adapter:
    """LoRA-XS without the SVD: Kaiming-uniform A and B, a small random core.

    The bounds are those of the published code, which draws both factors transposed.
    """
    A, B = (kaiming_uniform(shape, generator) for shape in ((n, r), (r, m)))
    core = torch.randn(r, r, generator=generator) * core_std
    return Adapter(A.T.contiguous(), core, B.T.contiguous())


def orthogonal(weight: torch.Tensor, r: int, generator: torch.Generator) -> Adapter:
    """Random orthonormal A and B, R = 0."""
    m, n = weight.shape
    A, B = (torch.linalg.qr(torch.randn(k, r, generator=generator)).Q for k in (n, m))
    return Adapter(A.T, torch.zeros(r, r), B)


def _lora_sb_in_batches(
    updates: Iterable[tuple[str, SignMatrix]], config: LoRASBConfig, eta: float
) -> Iterator[tuple[str, Adapter]]:
    """Decomposes layers of one shape together; until then their packed signs take little memory."""
    waiting: dict[torch.Size, dict[str, SignMatrix]] = {}

    def decompose(shape: torch.Size) -> Iterator[tuple[str, Adapter]]:
        layers = waiting.pop(shape)
        generator = torch.Generator().manual_seed(config.seed)
        adapters = lora_sb(list(layers.values()), config.r, eta, config.s, generator)
        return zip(layers, adapters, strict=True)

    for name, signs in updates:
        waiting.setdefault(signs.shape, {})[name] = signs
        if len(waiting[signs.shape]) == GPU.batch:
            yield from decompose(signs.shape)
    for shape in list(waiting):
        yield from decompose(shape)


def initialize(
    model: nn.Module,
    targets: dict[str, nn.Module],
    config: LoRASBConfig,
    batches: Iterable | None,
    eta: float | None,
    estimation: EstimationOptions,
    progress: bool,
) -> Iterator[tuple[str, Adapter]]:
    """Yields the name and the initial adapter of each target, in any order.

    The model is unchanged afterwards. Arguments as for `lorasb_kernels.adapt`.
    """
    if config.init in ("lora-one", "lora-sb-sgd"):
        batches = list(batches)
        sums = estimate_gradients(model, batches, list(targets), estimation, progress=progress)
        relative = config.init == "lora-one" and config.spectral_scaling == "relative"
        samples = 1 if relative else _samples(batches, targets)  # its scale does not matter there
        found = _from_gradients(sums, samples, config, eta)
    elif config.facts.needs_eta:
        updates = estimate_updates(model, batches, list(targets), estimation, progress=progress)
        found = _from_updates(updates, config, eta)
    else:
        found = _from_weights(targets, config)
    for name, adapter in found:
        yield name, orthonormal(adapter) if config.orthonormalize else adapter


def _samples(batches: Iterable, targets: dict[str, nn.Module]) -> int:
    """Samples in the batches of all data-parallel ranks."""
    device = next(iter(targets.values())).weight.device
    return ranks.sum_(torch.tensor(sum(map(sample_count, batches)), device=device)).item()


def _from_gradients(
    sums: Iterable[tuple[str, torch.Tensor]], samples: int, config: LoRASBConfig, eta: float | None
) -> Iterator[tuple[str, Adapter]]:
    """From gradients summed over samples."""
    for name, total in sums:
        generator = layer_generator(config.seed, name)
        gradient = total / samples
        if config.init == "lora-sb-sgd":
            yield name, lora_sb_sgd(gradient, config.r, eta, config.s, generator)
        else:
            options = (config.r, config.gamma, config.spectral_scaling, generator)
            yield name, lora_one(gradient, *options)


def _from_updates(
    updates: Iterable[tuple[str, SignMatrix]], config: LoRASBConfig, eta: float
) -> Iterator[tuple[str, Adapter]]:
    """From the signs of summed gradients."""
    if config.init in ("lora-sb", "scaled-b"):
        for name, adapter in _lora_sb_in_batches(updates, config, eta):
            yield name, adapter if config.init == "lora-sb" else scaled_b(adapter, config.s)
        return
    for name, signs in updates:
        generator = layer_generator(config.seed, name)
        yield name, noise(signs, config.r, eta, config.s, config.noise_std, generator)


def _from_weights(
    targets: dict[str, nn.Module], config: LoRASBConfig
) -> Iterator[tuple[str, Adapter]]:
    """From the pretrained weights, or from their shapes alone."""
    for name, linear in targets.items():
        generator = layer_generator(config.seed, name)
        weight = dense_weight(linear)
        if config.init == "lora-xs":
            yield name, lora_xs(weight, config.r, config.core_std, config.sigma_side, generator)
        elif config.init == "random-ab":
            yield name, random_ab(*weight.shape, config.r, config.core_std, generator)
        elif config.init == "kaiming-svd":
            yield name, kaiming_svd(weight.shape, config.r, config.s, generator, weight.device)
        elif config.init == "lora":
            yield name, lora(*weight.shape, config.r, generator)
        else:
            yield name, orthogonal(weight, config.r, generator)


__all__ = [
    "Adapter",
    "initialize",
    "kaiming_svd",
    "lora",
    "lora_one",
    "lora_sb",
    "lora_sb_sgd",
    "lora_xs",
    "noise",
    "orthogonal",
    "orthonormal",
    "random_ab",
    "scaled_b",
]
