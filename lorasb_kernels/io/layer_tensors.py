"""The tensors of adapted layers that are saved; checks of stored tensors against a model."""

import torch

from lorasb_kernels.io.base_check import check_base, quantizations, weight_probe
from lorasb_kernels.io.lora_xs import check_rebuilt, subspace_probes
from lorasb_kernels.io.subspace import SUBSPACE_FILE, Subspace
from lorasb_kernels.io.tensors import check_tensors, whole
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.quantization import dense_weight


def trained_factors(layers: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """What training changes in `layers`."""
    return {
        f"{name}.{factor}": whole(getattr(layer, factor))
        for name, layer in layers.items()
        for factor in layer.trained
    }


def frozen_tensors(layers: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """The frozen factors of `layers`, and a probe of each weight."""
    tensors = {}
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in layer.trained:
                tensors[f"{name}.{factor}"] = getattr(layer, factor)
        tensors[f"{name}.weight_probe"] = weight_probe(dense_weight(layer))
    return tensors


def check_stored(layers: dict[str, AdaptedLinear], stored: Subspace) -> None:
    """Raises ValueError unless A and B fit `layers` and their weights are those known."""
    check_tensors(stored.folder / SUBSPACE_FILE, stored.tensors, frozen_tensors(layers))
    same = quantizations(layers) == stored.record.quantization
    for name, layer in layers.items():
        check_base(name, dense_weight(layer), stored.tensors, stored.record.base_model, same)


def rebuilt_factors(layers: dict[str, AdaptedLinear], stored: Subspace) -> dict[str, torch.Tensor]:
    """A and B of LoRA-XS `layers`; ValueError unless they are those whose probes are stored."""
    own = subspace_probes(layers)
    check_tensors(stored.folder / SUBSPACE_FILE, stored.tensors, own)
    check_rebuilt(own, stored.tensors, stored.record.base_model)
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }


def refuse_merged(layers: dict[str, AdaptedLinear], before: str) -> None:
    """Raises ValueError if a layer is merged, as its R may be stale then; `before` says what."""
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; expected unmerge() before {before}")


__all__ = [
    "check_stored",
    "frozen_tensors",
    "rebuilt_factors",
    "refuse_merged",
    "trained_factors",
]
