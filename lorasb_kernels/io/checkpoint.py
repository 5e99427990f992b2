"""Saving and loading adapters: safetensors and JSON, no pickle.

    lorasb_config.json       the configuration, and the fingerprint of the subspace
    subspace.safetensors     A and B of every layer, written once per initialization
    adapter.safetensors      R of every layer (fp32) and the saved modules: what training changes

LoRA trains A and B: they are in `adapter.safetensors`, and `subspace.safetensors` only identifies
the frozen weights.

LoRA-XS has no `subspace.safetensors`: its A and B are rebuilt from the frozen weights, and
`adapter.safetensors` holds what identifies them (see `io/lora_xs.py`).

Each `adapter.safetensors` carries the fingerprint of the A and B it was trained with and the digest
of its own tensors, and `subspace.safetensors` holds a few elements of each frozen weight. So an
adapter that is combined with another subspace or another base model is refused, and a flipped bit
is found. Files are replaced as a whole; everything is checked before the model is changed.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorasb_kernels.adaptation import install, new_layer
from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.lora_xs import check_rebuilt, rebuild, subspace_probes
from lorasb_kernels.io.tensors import (
    check_tensors,
    digest_of,
    read_tensors,
    saved_tensors,
    whole,
)
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.quantization import dense_weight, quantization_of
from lorasb_kernels.targets import (
    adapted_layers,
    check_adaptable,
    find_saved_modules,
    find_targets,
    layers_of,
)
from lorasb_kernels.utils.files import read_json, write_tensors, write_text

CONFIG_FILE = "lorasb_config.json"
SUBSPACE_FILE = "subspace.safetensors"
ADAPTER_FILE = "adapter.safetensors"
FORMAT = "1"
_PROBE_ELEMENTS = 16
# The probe is kept in bf16, so that a base loaded in fp32, bf16 or fp16 passes; two roundings.
_PROBE_TOLERANCE = 2.0**-7
# For the cosine of the probes: with 4-bit codes it is 0.99, with another model's weights 0 ± 0.25.
_PROBE_LIKENESS = 0.9


class UntrainedAdapterWarning(UserWarning):
    """An adapter was loaded that was saved before it was trained."""


def save_adapter(model: nn.Module, directory: str | Path, trained: bool = True) -> None:
    """Writes the adapters of `model` to `directory`.

    A and B are written only if they are not in the directory already. Under `fully_shard` every
    rank must call it, because the parameters are gathered; all ranks write the same bytes.

    Args:
        model: an adapted model.
        directory: created if missing.
        trained: False marks the adapter as one that training only starts from, of which
            `load_adapter` warns.

    Raises:
        ValueError: the model holds no adapter, or a layer is merged (its R may be stale).
    """
    layers = layers_of(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]} is merged; expected unmerge() before saving")
    directory = Path(directory)
    fingerprint = subspace_fingerprint(model)
    rebuilt = model.lorasb_config.facts.rebuilt
    if _stored(directory) != (fingerprint, model.lorasb_config):
        if not rebuilt:
            write_tensors(
                directory / SUBSPACE_FILE,
                _subspace(layers),
                {"format": FORMAT, "subspace": fingerprint},
            )
        record = {
            "format": FORMAT,
            "subspace": fingerprint,
            "base_model": getattr(getattr(model, "config", None), "_name_or_path", None),
            "quantization": quantizations(layers),
            "config": model.lorasb_config.to_dict(),
        }
        write_text(directory / CONFIG_FILE, json.dumps(record, indent=2) + "\n")
    tensors = trained_tensors(model) | (subspace_probes(layers) if rebuilt else {})
    metadata = {"format": FORMAT, "subspace": fingerprint, "digest": digest_of(tensors)}
    metadata |= {} if trained else {"untrained": "true"}
    write_tensors(directory / ADAPTER_FILE, tensors, metadata)


def load_adapter(model: nn.Module, directory: str | Path, revision: str | None = None) -> nn.Module:
    """Loads the adapters in `directory` into `model`, adapting it first if it is plain.

    Args:
        model: the base model the adapter was made for, or an adapted one.
        directory: what `save_adapter` wrote, or the id of a hub repository that holds it.
        revision: branch, tag or commit of the repository.

    Returns:
        `model`. If anything raises, it is as it was.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged, do not belong together, belong to another base
            model, or whose names, shapes or dtypes do not fit; non-finite values; a model
            that is already sharded by `fully_shard`.
    """
    directory = local_folder(directory, (CONFIG_FILE, SUBSPACE_FILE, ADAPTER_FILE), revision)
    record, config, trained, subspace = read_adapter(directory)
    rebuilt = subspace is None
    existing = adapted_layers(model)
    if existing:
        if model.lorasb_config != config:
            raise ValueError(
                f"the model is adapted with {model.lorasb_config}; expected {config}, "
                f"as in {directory}"
            )
        _refuse_sharded(model)
        layers = existing
    else:
        targets = find_targets(model, config.target_modules, config.modules_to_save)
        check_adaptable(model, targets, config.r)
        layers = {name: new_layer(linear, config) for name, linear in targets.items()}
    saved = find_saved_modules(model, config.modules_to_save)
    expected = _trained(layers, saved) | (subspace_probes(layers) if rebuilt else {})
    check_tensors(directory / ADAPTER_FILE, trained, expected)
    if rebuilt:
        if not existing:
            rebuild(layers, config)
        check_rebuilt(subspace_probes(layers), trained, record.get("base_model"))
        subspace = _subspace(layers)
    else:
        check_tensors(directory / SUBSPACE_FILE, subspace, _subspace(layers))
        same = quantizations(layers) == record.get("quantization", [])
        for name, layer in layers.items():
            check_base(name, dense_weight(layer), subspace, record.get("base_model"), same)
    for name, layer in layers.items():
        tensors = subspace | trained
        names = ("lora_A", "lora_R", "lora_B")
        layer.set_adapter(*(tensors.get(f"{name}.{factor}") for factor in names))
    with torch.no_grad():
        for name, tensor in saved_tensors(saved).items():
            tensor.copy_(trained[name])
    if not existing:
        install(model, layers, saved, config)
    return model


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if whole(parameter) is not parameter:
            raise ValueError(
                f"{name} is sharded over ranks; expected load_adapter() before fully_shard()"
            )


def read_adapter(
    directory: Path,
) -> tuple[dict, LoRASBConfig, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Reads what `save_adapter` wrote, and checks that it belongs together.

    Returns:
        The record, the configuration in it, the tensors that training changes, and the
        subspace (None for LoRA-XS, whose A and B are rebuilt).

    Warns:
        UntrainedAdapterWarning: it was saved before it was trained.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged or do not belong together.
    """
    record, config = read_record(directory)
    trained, metadata = read_tensors(directory / ADAPTER_FILE)
    if "digest" in metadata and metadata["digest"] != digest_of(trained):
        raise ValueError(f"{directory / ADAPTER_FILE} is damaged: its digest is another")
    untrained = "untrained" in metadata
    stated = {CONFIG_FILE: record["subspace"], ADAPTER_FILE: metadata.get("subspace")}
    subspace = None
    if not config.facts.rebuilt:
        subspace, metadata = read_tensors(directory / SUBSPACE_FILE)
        stated[SUBSPACE_FILE] = metadata.get("subspace")
    if len(set(stated.values())) != 1:
        raise ValueError(
            f"the files in {directory} do not belong together; their subspace fingerprints "
            f"are {stated}"
        )
    if subspace is not None and fingerprint_of(subspace) != record["subspace"]:
        raise ValueError(f"{directory / SUBSPACE_FILE} is damaged: its fingerprint is another")
    if untrained:
        warnings.warn(
            f"{directory} holds an adapter as it was before training",
            UntrainedAdapterWarning,
            stacklevel=3,
        )
    return record, config, trained, subspace


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the trained factors of every layer and the saved modules' tensors."""
    saved = find_saved_modules(model, model.lorasb_config.modules_to_save)
    return _trained(layers_of(model), saved)


def subspace_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and the bits of every frozen A and B."""
    return fingerprint_of(_subspace(layers_of(model)))


def fingerprint_of(subspace: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bits of the `lora_A` and `lora_B` tensors.

    If there are none, as in LoRA, over the probes of the weights.
    """
    factors = {k: t for k, t in subspace.items() if k.endswith((".lora_A", ".lora_B"))}
    return digest_of(factors or subspace)


def _subspace(layers: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in layer.trained:
                tensors[f"{name}.{factor}"] = getattr(layer, factor)
        tensors[f"{name}.weight_probe"] = _probe(dense_weight(layer))
    return tensors


def _probe(weight: torch.Tensor) -> torch.Tensor:
    """Up to 16 evenly spaced elements of a frozen weight, in bf16."""
    flat = whole(weight.detach()).reshape(-1)
    step = max(1, flat.numel() // _PROBE_ELEMENTS)
    return flat[::step][:_PROBE_ELEMENTS].to(torch.bfloat16)


def _trained(
    layers: dict[str, AdaptedLinear], saved: dict[str, nn.Module]
) -> dict[str, torch.Tensor]:
    factors = {
        f"{name}.{factor}": whole(getattr(layer, factor))
        for name, layer in layers.items()
        for factor in layer.trained
    }
    return factors | saved_tensors(saved)


def _stored(directory: Path) -> tuple[str, LoRASBConfig] | None:
    """The fingerprint of the subspace in `directory` and its configuration; None if a file is
    missing or damaged."""
    try:
        record, config = read_record(directory)
        if config.facts.rebuilt:
            return record["subspace"], config
        with safe_open(directory / SUBSPACE_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, ValueError, SafetensorError, OSError):
        return None
    whole = metadata.get("subspace") == record["subspace"]
    return (record["subspace"], config) if whole else None


def read_record(directory: Path) -> tuple[dict, LoRASBConfig]:
    """The record of a saved adapter, and the configuration in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a record that `save_adapter` wrote.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a file that save_adapter wrote")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not an adapter record of format {FORMAT}")
    if not isinstance(record.get("subspace"), str) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} lacks 'subspace' or 'config'")
    try:
        return record, LoRASBConfig.from_dict(record["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def quantizations(layers: dict[str, nn.Module]) -> list[str]:
    """How the frozen weights of `layers` are quantized, each kind once."""
    return sorted({kind for layer in layers.values() if (kind := quantization_of(layer))})


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
    probe, own = subspace.get(f"{name}.weight_probe"), _probe(weight).float().cpu()
    if probe is None or probe.shape != own.shape:
        known = False
    elif same_quantization:
        rounding = _PROBE_TOLERANCE * own.abs() + 1e-6
        known = ((probe.float() - own).abs() <= rounding).all()
    else:
        known = torch.cosine_similarity(probe.float(), own, dim=0) >= _PROBE_LIKENESS
    if not known:
        raise ValueError(
            f"the weight of {name} is not the one this adapter was made for; "
            f"expected the base model {base_model!r}"
        )


__all__ = [
    "UntrainedAdapterWarning",
    "check_base",
    "fingerprint_of",
    "load_adapter",
    "quantizations",
    "read_adapter",
    "read_record",
    "save_adapter",
    "subspace_fingerprint",
    "trained_tensors",
]
