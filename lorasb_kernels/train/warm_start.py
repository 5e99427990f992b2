"""Starts a run from the adapter of another task: LoRA-XS starts RTE, MRPC and STS-B from MNLI."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.io.layer_tensors import check_stored, rebuilt_factors, trained_factors
from lorasb_kernels.io.subspace import Subspace, read_adapter
from lorasb_kernels.io.tensors import check_tensors, saved_tensors
from lorasb_kernels.targets import adapted_layers, find_saved_modules
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.utils.fields import shown

SAME = ("init", "r", "lora_alpha", "scaling", "use_rslora", "sigma_side")


def stored_adapter(source: str) -> tuple[Subspace, dict[str, torch.Tensor]]:
    """What `read_adapter` finds in a saved adapter, or in the output folder of a run.

    Raises:
        ConfigError: it finds nothing usable.
    """
    try:
        folder = Path(source) / "adapter"
        return read_adapter(folder if folder.is_dir() else source)
    except (ValueError, OSError) as error:
        raise ConfigError(f"init_from is {shown(source)}: {error}") from error


def seed_of(source: str) -> int:
    """The seed of the adapter in `source`: rebuilt factors are those of their seed."""
    return stored_adapter(source)[0].record.config.seed


@torch.no_grad()
def start_from(model: nn.Module, source: str) -> str:
    """Loads the adapter in `source`, and those of its saved tensors that fit by name and shape.

    A head for another number of classes does not fit: its last layer stays newly initialized.

    Args:
        model: an adapted model.
        source: what `save_adapter` wrote, or the output folder of a run that holds it.

    Returns:
        A message that says what was loaded and what was not.

    Raises:
        ConfigError: another kind of adapter, other layers, or another base model; nothing is
            changed then.
    """
    stored, trained = stored_adapter(source)
    config, own = stored.record.config, model.lorasb_config
    layers = adapted_layers(model)
    try:
        for name in SAME:
            if getattr(config, name) != getattr(own, name):
                raise ValueError(
                    f"its {name} is {getattr(config, name)!r}; expected {getattr(own, name)!r}"
                )
        _check_layers(stored.record.layers, layers)
        expected = trained_factors(layers)
        found = {name: tensor for name, tensor in trained.items() if name in expected}
        check_tensors(stored.folder, found, expected)
        if config.facts.rebuilt:
            frozen = rebuilt_factors(layers, stored)
        else:
            check_stored(layers, stored)
            frozen = stored.tensors
    except ValueError as error:
        raise ConfigError(f"init_from is {shown(source)}: {error}") from error
    tensors = frozen | trained
    for name, layer in layers.items():
        layer.set_adapter(*(tensors.get(f"{name}.{f}") for f in ("lora_A", "lora_R", "lora_B")))
    saved = saved_tensors(find_saved_modules(model, own.modules_to_save))
    fitting = [n for n in saved if n in trained and trained[n].shape == saved[n].shape]
    for name in fitting:
        saved[name].copy_(trained[name])
    new = sorted(saved.keys() - set(fitting))
    kept = f"; new: {', '.join(new)}" if new else ""
    return f"starts from {source}: {len(layers)} layers, {len(fitting)} tensors of the head{kept}"


def _check_layers(stored: tuple[str, ...], layers: Iterable[str]) -> None:
    for name in layers:
        if name not in stored:
            raise ValueError(f"it holds no {name}; expected the same layers")
    more = sorted(set(stored) - set(layers))
    if more:
        raise ValueError(f"it adapts {more[0]}, too; expected the same layers")
