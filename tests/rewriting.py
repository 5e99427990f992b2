"""Changes to saved adapters, with digests recomputed as an attacker would."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasb_kernels.io.tensors import digest_of, read_tensors


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Lets `change` edit the tensors of a file; its digest, if it has one, is recomputed."""
    tensors, metadata = read_tensors(path)
    change(tensors)
    if "digest" in metadata:
        metadata["digest"] = digest_of(tensors)
    save_file(tensors, path, metadata=metadata)
