"""What a checkpoint consists of: a damaged one is named, never resumed from.

safetensors knows where a file ends and nothing of its bits; `manifest.json` holds the SHA-256
of every file of the folder, and how many processes were training.
"""

import hashlib
import os
from pathlib import Path

from lorasb_kernels.train.errors import CheckpointError
from lorasb_kernels.utils.files import read_json, write_json

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def seal(folder: Path, processes: int) -> None:
    """Writes the manifest of the files in `folder`; all of them have reached the disk then."""
    files = {path.name: _digest(path, sync=True) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"processes": processes, "files": files})
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check(folder: Path, processes: int) -> None:
    """Checks every file of a sealed folder.

    Raises:
        CheckpointError: a file is missing or is not what was written, or another number of
            processes was training, which makes another batch.
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
