"""Optimizer, scheduler and RNG states as safetensors: nested values without pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorasb_kernels.utils.files import write_tensors


def save_state(path: Path, state: Any) -> None:
    """Writes nested dicts, lists and tuples of numbers, texts, None and tensors.

    Tensors go into the file's tensors, everything else into its metadata as JSON.

    Raises:
        TypeError: a value of another kind.
    """
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):  # as pairs: keys may be numbers
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [encode(item) for item in value]}
        if isinstance(value, list):
            return [encode(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"cannot save a {type(value).__name__}")

    skeleton = json.dumps(encode(state))
    write_tensors(path, tensors, {"state": skeleton})


def load_state(path: Path) -> Any:
    """Reads what `save_state` wrote; tensors arrive on the CPU."""
    with safe_open(path, framework="pt") as file:

        def decode(value: Any) -> Any:
            if isinstance(value, list):
                return [decode(item) for item in value]
            if not isinstance(value, dict):
                return value
            ((kind, content),) = value.items()
            if kind == "tensor":
                return file.get_tensor(content)
            if kind == "tuple":
                return tuple(decode(item) for item in content)
            return {decode(key): decode(item) for key, item in content}

        return decode(json.loads(file.metadata()["state"]))
