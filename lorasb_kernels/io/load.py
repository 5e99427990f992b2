"""Loads what `save_adapter` wrote; everything is checked before the model is changed."""

from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.io.layer_tensors import (
    check_stored,
    rebuilt_factors,
    refuse_merged,
    trained_factors,
)
from lorasb_kernels.io.lora_xs import rebuild
from lorasb_kernels.io.pretrained import save_adapter_only
from lorasb_kernels.io.subspace import ADAPTER_FILE, Subspace, read_adapter
from lorasb_kernels.io.tensors import check_tensors, saved_tensors, whole
from lorasb_kernels.nn.install import install, new_layer
from lorasb_kernels.targets import adapted_layers, find_layers, find_saved_modules


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    revision: str | None = None,
    *,
    subspace: str | Path | Subspace | None = None,
) -> nn.Module:
    """Loads the adapters in `directory` into `model`, adapting it first if it is plain.

    Args:
        model: the base model the adapter was made for, or an adapted one.
        directory: what `save_adapter` wrote, or the id of a hub repository that holds it.
        revision: branch, tag or commit of the repository.
        subspace: where A and B are, if not in `directory` or where the adapter says: a folder, a
            hub repository, or what `Subspace.load` read of one, once for many adapters.

    Returns:
        `model`. If anything raises, it is as it was.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged, do not belong together, belong to another base
            model, or whose names, shapes or dtypes do not fit; non-finite values; a model
            that is already sharded by `fully_shard`, or with a merged layer.
    """
    stored, trained = read_adapter(directory, revision, subspace)
    record, config = stored.record, stored.record.config
    existing = adapted_layers(model)
    if existing:
        if model.lorasb_config != config or set(existing) != set(record.layers):
            raise ValueError(
                f"the model is adapted with {model.lorasb_config} in {len(existing)} layers; "
                f"expected {config} in {len(record.layers)}, as in {directory}"
            )
        _refuse_sharded(model)
        refuse_merged(existing, "loading")
        layers = existing
    else:
        targets = find_layers(model, record.layers, config.r, config.modules_to_save)
        layers = {name: new_layer(linear, config) for name, linear in targets.items()}
    saved = find_saved_modules(model, config.modules_to_save)
    check_tensors(
        Path(directory) / ADAPTER_FILE, trained, trained_factors(layers) | saved_tensors(saved)
    )
    if config.facts.rebuilt:
        if not existing:
            rebuild(layers, config)
        frozen = rebuilt_factors(layers, stored)
    else:
        check_stored(layers, stored)
        frozen = stored.tensors
    for name, layer in layers.items():
        tensors = frozen | trained
        lora_A, lora_B = (tensors[f"{name}.{factor}"] for factor in ("lora_A", "lora_B"))
        layer.set_adapter(lora_A, tensors.get(f"{name}.lora_R"), lora_B)
    with torch.no_grad():
        for name, tensor in saved_tensors(saved).items():
            tensor.copy_(trained[name])
    if not existing:
        install(model, layers, saved, config)
        save_adapter_only(model)
    return model


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if whole(parameter) is not parameter:
            raise ValueError(
                f"{name} is sharded over ranks; expected load_adapter() before fully_shard()"
            )


__all__ = ["load_adapter"]
