"""Recognizes the frozen weights an adapter was made for, by a few of their elements."""

from collections.abc import Mapping

import torch
from torch import nn

from lorasb_kernels.io.tensors import whole
from lorasb_kernels.quantization import quantization_of

_ELEMENTS = 16
# The probe is kept in bf16, so that a base loaded in fp32, bf16 or fp16 passes; two roundings.
_TOLERANCE = 2.0**-7
# For the cosine of the probes: with 4-bit codes it is 0.99, with another model's weights 0 ± 0.25.
_LIKENESS = 0.9


def weight_probe(weight: torch.Tensor) -> torch.Tensor:
    """Up to 16 evenly spaced elements of a frozen weight, in bf16."""
    flat = whole(weight.detach()).reshape(-1)
    step = max(1, flat.numel() // _ELEMENTS)
    return flat[::step][:_ELEMENTS].to(torch.bfloat16)


def quantizations(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """How the frozen weights of `layers` are quantized, each kind once."""
    kinds = {kind for layer in layers.values() if (kind := quantization_of(layer))}
    return tuple(sorted(kinds))


def check_base(
    name: str,
    weight: torch.Tensor,
    subspace: dict[str, torch.Tensor],
    base_model: str | None,
    same_quantization: bool,
) -> None:
    """Raises ValueError if `weight` is not the one of layer `name` that the adapter knew.

    Weights that were quantized in another way, or not at all, need only be similar.
    """
    probe, own = subspace.get(f"{name}.weight_probe"), weight_probe(weight).float().cpu()
    if probe is None or probe.shape != own.shape:
        known = False
    elif same_quantization:
        rounding = _TOLERANCE * own.abs() + 1e-6
        known = bool(((probe.float() - own).abs() <= rounding).all())
    else:
        known = bool(torch.cosine_similarity(probe.float(), own, dim=0) >= _LIKENESS)
    if not known:
        raise ValueError(
            f"the weight of {name} is not the one this adapter was made for; "
            f"expected the base model {base_model!r}"
        )


__all__ = ["check_base", "quantizations", "weight_probe"]
