"""The files of a checkpoint, and the check that they are undamaged before a run resumes.

safetensors detects a truncated file, but not a flipped bit, so `manifest.json` holds the SHA-256 of
every file of the folder, and how many processes were training. Optimizer, scheduler and RNG states
are nested values, stored as safetensors with JSON, because `torch.load` reads a pickle, even with
`weights_only=True`.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorasb_kernels.train.errors import CheckpointError
from lorasb_kernels.utils.files import read_json, write_json, write_tensors

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def seal(folder: Path, processes: int) -> None:
    """Writes the manifest of the files in `folder`, after all of them are on disk."""
    files = {path.name: _digest(path, sync=True) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"processes": processes, "files": files})
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check(folder: Path, processes: int) -> None:
    """Checks every file of a sealed folder.

    Raises:
        CheckpointError: a file is missing or has changed, or another number of processes was
            training, which would change the batches.
    """
    advice = f"expected it as it was written; remove {folder} to go on from the one before"
    try:
        manifest = read_json(folder / MANIFEST)
        trained_by, digests = manifest["processes"], dict(manifest["files"])
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no usable {MANIFEST}: {error}; {advice}") from error
    for name, digest in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {advice}")
        if _digest(path) != digest:
            raise CheckpointError(f"{path} is damaged; {advice}")
    if trained_by != processes:
        raise CheckpointError(
            f"{folder} was written by {trained_by} processes; expected as many, not {processes}, "
            "as their number is part of the batch"
        )


def _digest(path: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


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
