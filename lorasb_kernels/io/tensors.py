"""Tensors to and from safetensors files: reading, checking, gathering, digests."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


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


__all__ = ["check_tensors", "digest_of", "read_tensors", "saved_tensors", "whole"]
