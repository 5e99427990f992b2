"""The cores alone, from a trainer to the model that generates rollouts: kilobytes, in memory.

The two models share everything but R: both are adapted from one base with one subspace, such as by
`load_adapter` of what the trainer saved at the start. A merged receiver is merged anew:

    load_cores(generator, sync_cores(policy))
"""

from collections.abc import Mapping

import torch
from torch import nn

from lorasb_kernels.io.tensors import whole
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.targets import config_of, layers_of


def sync_cores(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every core of `model`, for `load_cores` of another one or another process.

    Returns:
        `<layer>.lora_R` → R [r, r], in its dtype (fp32, or fp64 over an fp64 weight) and on its
        device, whole where it is sharded.

    Raises:
        ValueError: a plain model, or adapters without cores (LoRA).
    """
    return {name: whole(core.detach()).clone() for name, core in _cores(model).items()}


@torch.no_grad()
def load_cores(model: nn.Module, cores: Mapping[str, torch.Tensor]) -> None:
    """Gives every adapted layer of `model` the core that `sync_cores` handed out.

    In place, so that optimizers and captured graphs keep their tensors. Merged layers are unmerged
    and merged again, where the original weight was kept: without it W would be rounded once more
    at every call.

    Args:
        model: adapted with the A and B of the model the cores are from, which is not checked.
        cores: as `sync_cores` returns them, on any device.

    Raises:
        ValueError: a plain model, adapters without cores, cores that are missing, unknown, of
            another shape or not finite, or a layer merged without `keep_original`. No layer is
            changed then.
    """
    own = _cores(model)
    missing, unknown = sorted(own.keys() - cores.keys()), sorted(cores.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"cores lacks {len(missing)} of {len(own)} names, such as {missing[:1]}, and has "
            f"{len(unknown)} unknown ones, such as {unknown[:1]}; expected those of sync_cores()"
        )
    for name, core in own.items():
        if cores[name].shape != core.shape:
            raise ValueError(
                f"cores[{name!r}] has shape {list(cores[name].shape)}; expected {list(core.shape)}"
            )
        if not cores[name].isfinite().all():
            raise ValueError(f"cores[{name!r}] is not finite")
    merged = {name: layer for name, layer in layers_of(model).items() if layer.merged}
    for name, layer in merged.items():
        if layer.original_weight is None:
            raise ValueError(
                f"{name} is merged and its original weight was not kept; expected unmerge(), or "
                "merge(keep_original=True)"
            )
    for layer in merged.values():
        layer.unmerge()
    for name, core in own.items():
        core.copy_(cores[name])
    for layer in merged.values():
        layer.merge(keep_original=True)


def _cores(model: nn.Module) -> dict[str, torch.Tensor]:
    layers: dict[str, AdaptedLinear] = layers_of(model)
    config = config_of(model)
    if not config.facts.has_core:
        raise ValueError(
            f"the model's init is {config.init!r}, which trains A and B; expected adapters that "
            "train cores"
        )
    return {
        f"{name}.lora_R": layer.lora_R for name, layer in layers.items() if layer.lora_R is not None
    }


__all__ = ["load_cores", "sync_cores"]
