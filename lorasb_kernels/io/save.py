"""Saving adapters: safetensors and JSON, no pickle.

    lorasb_config.json       the record: configuration, layers, fingerprint (`io/record.py`)
    subspace.safetensors     A and B of every layer, written once per initialization
    adapter.safetensors      the R's, packed, and the saved modules: what training changes
    README.md                a model card, unless there is one (`io/model_card.py`)

LoRA trains A and B: they are in `adapter.safetensors`, and `subspace.safetensors` only identifies
the frozen weights. LoRA-XS rebuilds A and B from the frozen weights, and `subspace.safetensors`
holds what identifies them (see `io/lora_xs.py`).

The fingerprint in the record covers the configuration and the digest of `subspace.safetensors`,
which also holds a few elements of each frozen weight. `adapter.safetensors` states that fingerprint
and the digest of its own tensors. So an adapter that is combined with another subspace, other
settings or another base model is refused, and a flipped bit is found. Files are replaced as a
whole: a save that is interrupted between two of them leaves the old adapter, the new one, or files
that `load_adapter` refuses because they do not belong together.

Adapters that share A and B need not store them: with `save_adapter(..., subspace=folder)` an
adapter is `adapter.safetensors` alone, and states where the other two files are.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorasb_kernels.io.base_check import quantizations
from lorasb_kernels.io.layer_tensors import (
    check_stored,
    frozen_tensors,
    rebuilt_factors,
    refuse_merged,
    trained_factors,
)
from lorasb_kernels.io.lora_xs import subspace_probes
from lorasb_kernels.io.model_card import public_name, write_card
from lorasb_kernels.io.record import CONFIG_FILE, FORMAT, Record, read_fields
from lorasb_kernels.io.subspace import ADAPTER_FILE, SUBSPACE_FILE, Subspace
from lorasb_kernels.io.tensors import FACTOR_DTYPES, digest_of, pack_cores, saved_tensors
from lorasb_kernels.linear_layers import stores_transposed
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.targets import config_of, find_saved_modules, layers_of
from lorasb_kernels.utils.files import write_tensors


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    subspace: str | Path | Subspace | None = None,
    trained: bool = True,
) -> None:
    """Writes the adapters of `model` to `directory`.

    A and B are written only if they are not in the directory already. Equal adapters give equal
    bytes, in any process. Under `fully_shard` every rank must call it, because the parameters are
    gathered.

    Args:
        model: an adapted model.
        directory: created if missing.
        dtype: fp32, fp16 or bf16, to which the trained factors are rounded once; by default they
            keep their dtype, fp32. The modules of `modules_to_save` always keep theirs.
        subspace: an adapter's folder or hub repository (or `Subspace.load` of it) whose A, B and
            configuration are the model's: only what training changes is written, and where
            `subspace` is.
        trained: False marks the adapter as one that training only starts from, of which
            `load_adapter` warns.

    Raises:
        FileNotFoundError: `subspace` is not there.
        ValueError: the model holds no adapter, a layer is merged (its R may be stale), a factor
            that is finite is not so in `dtype`, or the model's subspace is not `subspace`.
    """
    layers = layers_of(model)
    refuse_merged(layers, "saving")
    saved = find_saved_modules(model, config_of(model).modules_to_save)
    tensors = _rounded(trained_factors(layers), dtype) | saved_tensors(saved)
    directory = Path(directory)
    metadata = {"format": FORMAT} | ({} if trained else {"untrained": "true"})
    if subspace is None:
        record = _write_subspace(model, layers, directory)
    else:
        if not isinstance(subspace, Subspace):
            subspace = Subspace.load(subspace)
        _check_same_subspace(model, layers, subspace)
        record = subspace.record
        metadata |= _place(directory, subspace)
    if unreached := _unreached(layers, tensors):
        metadata["unreached"] = json.dumps(unreached)
    packed = pack_cores(tensors, record.layers)
    metadata |= {"fingerprint": record.fingerprint, "digest": digest_of(packed)}
    write_tensors(directory / ADAPTER_FILE, packed, metadata)


def _unreached(layers: dict[str, AdaptedLinear], tensors: dict[str, torch.Tensor]) -> list[str]:
    """The layers that no step of training reached, though their adapters are not zero."""
    return [
        name
        for name, layer in layers.items()
        if layer.reached is False
        and all(tensors[f"{name}.{factor}"].any() for factor in layer.trained)
    ]


def _write_subspace(model: nn.Module, layers: dict[str, AdaptedLinear], directory: Path) -> Record:
    """Writes the record and the subspace unless they are there; returns the record."""
    config = config_of(model)
    tensors = subspace_probes(layers) if config.facts.rebuilt else frozen_tensors(layers)
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    digest = digest_of(tensors)
    transposed = tuple(name for name, layer in layers.items() if stores_transposed(layer))
    kinds = quantizations(layers)
    record = Record.of(config, tuple(layers), kinds, digest, public_name(base_model), transposed)
    if not _stored(directory, record):
        metadata = {"format": FORMAT, "digest": digest}
        write_tensors(directory / SUBSPACE_FILE, tensors, metadata)
        record.write(directory)
        write_card(directory, record, base_model)
    return record


def _stored(directory: Path, record: Record) -> bool:
    """Whether `directory` holds `record` and the subspace it belongs to."""
    try:
        fields = read_fields(directory)
        if fields["format"] != FORMAT:
            return False
        stored = Record.from_fields(fields, directory / CONFIG_FILE)
        with safe_open(directory / SUBSPACE_FILE, framework="pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, ValueError, SafetensorError, OSError):
        return False
    return stored == record and metadata.get("digest") == record.subspace


def _place(directory: Path, subspace: Subspace) -> dict[str, str]:
    """Metadata that say where the subspace of an adapter is; none where it is beside it."""
    folder = subspace.folder.resolve()
    if directory.resolve() == folder:
        return {}
    if (directory / CONFIG_FILE).exists():
        raise ValueError(
            f"{directory} holds a subspace of its own; expected another folder for an adapter of "
            f"the one in {subspace.folder}"
        )
    if subspace.hub_id is not None:
        return {"subspace": subspace.hub_id}
    # Relative, so that adapters and subspace can move together.
    return {"subspace": Path(os.path.relpath(folder, directory.resolve())).as_posix()}


def _rounded(
    factors: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    if dtype is None:
        return factors
    if dtype not in FACTOR_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, FACTOR_DTYPES))}")
    rounded = {name: factor.detach().to(dtype) for name, factor in factors.items()}
    for name, factor in factors.items():
        if factor.isfinite().all() and not rounded[name].isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}; expected a dtype with more range")
    return rounded


def _check_same_subspace(
    model: nn.Module, layers: dict[str, AdaptedLinear], stored: Subspace
) -> None:
    """Raises ValueError unless configuration, layers, A and B of the model are those stored."""
    record = stored.record
    if config_of(model) != record.config or set(layers) != set(record.layers):
        raise ValueError(
            f"the model is adapted with {config_of(model)} in {len(layers)} layers; expected "
            f"{record.config} in {len(record.layers)}, as in {stored.folder}"
        )
    if record.config.facts.rebuilt:
        rebuilt_factors(layers, stored)
        return
    check_stored(layers, stored)
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            if factor in layer.trained:
                continue
            own = getattr(layer, factor).detach().cpu()
            if not torch.equal(stored.tensors[f"{name}.{factor}"].to(own.dtype), own):
                raise ValueError(
                    f"{factor} of {name} is not the one in {stored.folder}; expected an adapter "
                    "that was loaded from there"
                )


__all__ = ["save_adapter"]
