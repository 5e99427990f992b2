"""LoRA-XS adapters without A and B: both are rebuilt from the frozen weight.

The truncated SVD starts from a seeded draw, so for the same weight it is the same up to the
rounding of the machine's matrix products; a hash over its bits would refuse an adapter from
another machine. The rebuilt factors are therefore identified by numbers:

    A·Z [r, 4]  and  Bᵀ·Z [r, 4]     Z the columns cos(f·k), k = 1, 2, …, of norm 1

A singular vector with the opposite sign, or of another weight, changes these far more than rounding
does.
"""

import torch

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.init.methods import layer_generator, lora_xs, orthonormal
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.quantization import dense_weight

_FREQUENCIES = (1.0, 1.9, 2.7, 0.3)
_TOLERANCE = 0.02  # A and B in bf16 differ from themselves by about 0.004


def _project(factor: torch.Tensor) -> torch.Tensor:
    """`factor` [r, k] times the four fixed directions, fp32 [r, 4] on the CPU."""
    positions = torch.arange(1, factor.shape[1] + 1, dtype=torch.float64)
    directions = torch.cos(positions[:, None] * torch.tensor(_FREQUENCIES, dtype=torch.float64))
    directions /= directions.norm(dim=0)
    return (factor.detach().cpu().double() @ directions).float()


def factor_probes(name: str, lora_A: torch.Tensor, lora_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """What identifies A and B of one layer: `<name>.lora_A_probe` and `<name>.lora_B_probe`."""
    return {f"{name}.lora_A_probe": _project(lora_A), f"{name}.lora_B_probe": _project(lora_B.T)}


def subspace_probes(layers: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """`factor_probes` of every layer."""
    probes = {}
    for name, layer in layers.items():
        probes |= factor_probes(name, layer.lora_A, layer.lora_B)
    return probes


def rebuild_factors(
    name: str, weight: torch.Tensor, config: LoRASBConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, n] and B [m, r] that LoRA-XS gives the layer `name` of this weight, fp32."""
    generator = layer_generator(config.seed, name)
    adapter = lora_xs(weight.detach(), config.r, config.core_std, config.sigma_side, generator)
    if config.orthonormalize:
        adapter = orthonormal(adapter)
    return adapter.lora_A, adapter.lora_B


def rebuild(layers: dict[str, AdaptedLinear], config: LoRASBConfig) -> None:
    """Gives each layer the A and B of its LoRA-XS initialization and R = 0."""
    for name, layer in layers.items():
        lora_A, lora_B = rebuild_factors(name, dense_weight(layer), config)
        layer.set_adapter(lora_A, torch.zeros_like(layer.lora_R), lora_B)


def check_rebuilt(
    probes: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], base_model: str | None
) -> None:
    """Raises ValueError if a rebuilt A or B is not the one whose probes were stored."""
    for name, own in probes.items():
        scale = own.abs() + own.square().mean().sqrt()
        if ((stored[name].float() - own).abs() > _TOLERANCE * scale).any():
            raise ValueError(
                f"{name.removesuffix('_probe')}, rebuilt from the weight, is not the one this "
                f"adapter was trained with; expected the base model {base_model!r} in the dtype "
                "it was trained in"
            )


__all__ = ["check_rebuilt", "factor_probes", "rebuild", "rebuild_factors", "subspace_probes"]
