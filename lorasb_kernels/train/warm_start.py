"""Starts a run from the adapter of another task: LoRA-XS starts RTE, MRPC and STS-B from MNLI."""

from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.io.checkpoint import (
    ADAPTER_FILE,
    CONFIG_FILE,
    SUBSPACE_FILE,
    check_base,
    read_adapter,
)
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.lora_xs import check_rebuilt, subspace_probes
from lorasb_kernels.io.tensors import saved_tensors
from lorasb_kernels.quantization import dense_weight
from lorasb_kernels.targets import adapted_layers, find_saved_modules
from lorasb_kernels.train.errors import ConfigError, shown

SAME = ("init", "r", "lora_alpha", "scaling", "use_rslora", "sigma_side")


def stored_adapter(source: str) -> tuple:
    """What `read_adapter` finds in a saved adapter, or in the output folder of a run.

    Raises:
        ConfigError: it finds nothing usable.
    """
    try:
        folder = Path(source) / "adapter"
        if not folder.is_dir():
            folder = local_folder(source, (CONFIG_FILE, SUBSPACE_FILE, ADAPTER_FILE))
        return read_adapter(folder)
    except (ValueError, OSError) as error:
        raise ConfigError(f"init_from is {shown(source)}: {error}") from error


def seed_of(source: str) -> int:
    """The seed of the adapter in `source`: rebuilt factors are those of their seed."""
    return stored_adapter(source)[1].seed


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
    record, config, trained, subspace = stored_adapter(source)
    layers, own = adapted_layers(model), model.lorasb_config
    try:
        for name in SAME:
            if getattr(config, name) != getattr(own, name):
                raise ValueError(
                    f"its {name} is {getattr(config, name)!r}; expected {getattr(own, name)!r}"
                )
        tensors = trained | (subspace or {})
        factors = {
            name: [tensors.get(f"{name}.{factor}") for factor in ("lora_A", "lora_R", "lora_B")]
            for name in layers
        }
        _check_layers(factors, layers, {name.rpartition(".lora_")[0] for name in tensors})
        if subspace is None:
            check_rebuilt(subspace_probes(layers), trained, record.get("base_model"))
        else:
            for name, layer in layers.items():
                weight = dense_weight(layer)
                check_base(name, weight, subspace, record.get("base_model"), True)
    except ValueError as error:
        raise ConfigError(f"init_from is {shown(source)}: {error}") from error
    for name, layer in layers.items():
        A, R, B = factors[name]
        layer.set_adapter(layer.lora_A if A is None else A, R, layer.lora_B if B is None else B)
    saved = saved_tensors(find_saved_modules(model, own.modules_to_save))
    fitting = [n for n in saved if n in trained and trained[n].shape == saved[n].shape]
    for name in fitting:
        saved[name].copy_(trained[name])
    new = sorted(saved.keys() - set(fitting))
    kept = f"; new: {', '.join(new)}" if new else ""
    return f"starts from {source}: {len(layers)} layers, {len(fitting)} tensors of the head{kept}"


def _check_layers(factors: dict, layers: dict, stored: set[str]) -> None:
    for name, (_, R, B) in factors.items():
        core = layers[name].lora_R
        if (R is None) != (core is None) or (R is None and B is None):
            raise ValueError(f"it holds no {name}; expected the same layers")
        if R is not None and R.shape != core.shape:
            raise ValueError(f"its {name}.lora_R is {tuple(R.shape)}; expected {tuple(core.shape)}")
    more = sorted(stored - factors.keys() - {""})
    if more:
        raise ValueError(f"it adapts {more[0]}, too; expected the same layers")
