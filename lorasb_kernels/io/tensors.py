"""Tensors to and from safetensors files: reading, checking, gathering, digests."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

CORES = "cores"
FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # to round factors to on writing


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a file that save_adapter wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_tensors(
    path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Raises ValueError unless names, shapes and kinds of dtype agree and all is finite."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        raise ValueError(f"{path}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}; "
                f"expected {tuple(expected[name].shape)}"
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} has dtype {tensor.dtype}; expected {expected[name].dtype}"
            )
        # In the layer's dtype: 1e300 in a float64 file is infinite in a float32 layer.
        if tensor.is_floating_point() and not tensor.to(expected[name].dtype).isfinite().all():
            raise ValueError(f"{path}: {name} holds non-finite values")


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bits of `tensors`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode("utf-8", "replace"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_cores(tensors: dict[str, torch.Tensor], layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """`tensors` with the R's of `layers` stacked into one tensor, `cores` [layers, r, r].

    One entry in the header of the file for all of them: an entry for each adds a fifth to an R of
    16 × 16 in bf16. As they were, where a layer has no R or their shapes differ.
    """
    names = [f"{layer}.lora_R" for layer in layers]
    shapes = {tensors[name].shape if name in tensors else None for name in names}
    if None in shapes or len(shapes) != 1:
        return tensors
    others = {name: tensor for name, tensor in tensors.items() if name not in set(names)}
    return {CORES: torch.stack([tensors[name].detach().cpu() for name in names]), **others}


def unpack_cores(
    tensors: dict[str, torch.Tensor], layers: Sequence[str], r: int
) -> dict[str, torch.Tensor]:
    """Inverse of `pack_cores`.

    Raises:
        ValueError: not exactly one core [r, r] for each layer.
    """
    if CORES not in tensors:
        return tensors
    shape, expected = tuple(tensors[CORES].shape), (len(layers), r, r)
    if shape != expected:
        raise ValueError(f"{CORES} has shape {shape}; expected {expected}, an R for each layer")
    cores = {f"{layer}.lora_R": core for layer, core in zip(layers, tensors[CORES], strict=True)}
    others = {name: tensor for name, tensor in tensors.items() if name != CORES}
    if twice := sorted(cores.keys() & others.keys()):
        raise ValueError(f"{twice[0]} is there beside {CORES}; expected each R once")
    return cores | others


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def saved_tensors(saved: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors of the modules trained whole, by their names in the model."""
    return {
        f"{name}.{key}": whole(tensor)
        for name, module in saved.items()
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


__all__ = [
    "CORES",
    "FACTOR_DTYPES",
    "check_tensors",
    "digest_of",
    "pack_cores",
    "read_tensors",
    "saved_tensors",
    "unpack_cores",
    "whole",
]
