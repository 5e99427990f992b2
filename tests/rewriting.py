"""Changes to saved adapters, with digests recomputed as an attacker would."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasb_kernels.io.record import CONFIG_FILE, fingerprint_of
from lorasb_kernels.io.subspace import ADAPTER_FILE, SUBSPACE_FILE
from lorasb_kernels.io.tensors import digest_of, read_tensors


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Lets `change` edit the tensors of a file; its digest, if it has one, is recomputed."""
    tensors, metadata = read_tensors(path)
    change(tensors)
    if "digest" in metadata:
        metadata["digest"] = digest_of(tensors)
    save_file(tensors, path, metadata=metadata)


def restate(folder: Path) -> None:
    """Gives the files of an adapter the digests and the fingerprint of what they hold now."""
    rewrite(folder / SUBSPACE_FILE, lambda tensors: None)
    record = json.loads((folder / CONFIG_FILE).read_text())
    record["subspace"] = read_tensors(folder / SUBSPACE_FILE)[1]["digest"]
    record["fingerprint"] = fingerprint_of(record)
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    tensors, metadata = read_tensors(folder / ADAPTER_FILE)
    metadata |= {"fingerprint": record["fingerprint"], "digest": digest_of(tensors)}
    save_file(tensors, folder / ADAPTER_FILE, metadata=metadata)
