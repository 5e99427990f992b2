"""Reads adapters in format 1, which earlier versions saved.

In format 1 the record lists no layers: they are those whose tensors are in `adapter.safetensors`,
one tensor per R. The fingerprint covers A and B alone (the probes where none is stored), and the
probes of LoRA-XS stand beside the R's.
"""

from pathlib import Path

import torch

from lorasb_kernels.io.record import Record, read_base_model, read_config
from lorasb_kernels.io.tensors import digest_of, read_tensors

_PROBES = (".lora_A_probe", ".lora_B_probe")


def read(
    config_file: Path, adapter_file: Path, subspace_file: Path, fields: dict
) -> tuple[Record, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The record, the trained tensors and the subspace of an adapter in format 1.

    Args:
        config_file, adapter_file, subspace_file: its files; LoRA-XS has no subspace file.
        fields: what `config_file` holds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged or do not belong together.
    """
    if not isinstance(fields.get("subspace"), str):
        raise ValueError(f"{config_file} lacks 'subspace'")
    config, base_model = read_config(fields, config_file), read_base_model(fields, config_file)
    quantization = fields.get("quantization", [])
    if not isinstance(quantization, list) or not all(isinstance(k, str) for k in quantization):
        raise ValueError(
            f"{config_file}: quantization is {str(quantization)[:200]}; expected names"
        )
    trained, metadata = read_tensors(adapter_file)
    if "digest" in metadata and metadata["digest"] != digest_of(trained):
        raise ValueError(f"{adapter_file} is damaged: its digest is another")
    stated = {config_file.name: fields["subspace"], adapter_file.name: metadata.get("subspace")}
    if config.facts.rebuilt:
        subspace = {k: trained.pop(k) for k in list(trained) if k.endswith(_PROBES)}
    else:
        subspace, metadata = read_tensors(subspace_file)
        stated[subspace_file.name] = metadata.get("subspace")
    if len(set(stated.values())) != 1:
        raise ValueError(
            f"the files in {config_file.parent} do not belong together; their subspace "
            f"fingerprints are {stated}"
        )
    if not config.facts.rebuilt and fingerprint_of(subspace) != fields["subspace"]:
        raise ValueError(f"{subspace_file} is damaged: its fingerprint is another")
    suffixes = (".lora_R", ".lora_A")  # of a core, and of LoRA, which has none
    layers = tuple(name.rpartition(".")[0] for name in trained if name.endswith(suffixes))
    if not layers:
        raise ValueError(f"{adapter_file} holds no adapted layer; expected lora_R or lora_A")
    record = Record(
        config,
        tuple(dict.fromkeys(layers)),
        tuple(quantization),
        fields["subspace"],
        base_model,
        fields["subspace"],
    )
    return record, trained, subspace


def fingerprint_of(subspace: dict[str, torch.Tensor]) -> str:
    """SHA-256 over A and B, or over the probes of the weights where there are none (LoRA)."""
    factors = {k: t for k, t in subspace.items() if k.endswith((".lora_A", ".lora_B"))}
    return digest_of(factors or subspace)


__all__ = ["fingerprint_of", "read"]
