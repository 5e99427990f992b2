"""The part that adapters of one initialization share, read and checked once for all of them.

    folder/lorasb_config.json      the record: configuration, layers, fingerprint
    folder/subspace.safetensors    A and B of every layer, and what identifies the base model

An adapter beside it, or in a folder of its own, is one file of the tensors that training changes,
`adapter.safetensors`, whose metadata state the fingerprint.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorasb_kernels.io import format_1
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.record import CONFIG_FILE, FORMAT, Record, read_fields
from lorasb_kernels.io.tensors import digest_of, read_tensors, unpack_cores
from lorasb_kernels.nn.reached import UnreachedLayerWarning

SUBSPACE_FILE = "subspace.safetensors"
ADAPTER_FILE = "adapter.safetensors"


class UntrainedAdapterWarning(UserWarning):
    """An adapter was loaded that was saved before it was trained."""


@dataclass(frozen=True)
class Subspace:
    """The frozen part of saved adapters: `record`, and `tensors` by their names in the model.

    `tensors` are `<layer>.lora_A` [r, n] and `<layer>.lora_B` [m, r] where they are frozen and
    stored, and small probes of the base model's weights (of A and B, for LoRA-XS, which rebuilds
    them).
    """

    folder: Path
    record: Record
    tensors: dict[str, torch.Tensor]
    hub_id: str | None = None  # where `folder` is a copy of a hub repository

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> "Subspace":
        """Reads the subspace in a folder that `save_adapter` wrote.

        Args:
            source: the folder, or the id of a hub repository that holds it.
            revision: branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files that are damaged or do not belong together, or of format 1.
        """
        folder = local_folder(source, (CONFIG_FILE, SUBSPACE_FILE), revision)
        fields = read_fields(folder)
        if fields["format"] != FORMAT:
            raise ValueError(
                f"{folder / CONFIG_FILE} is of format {fields['format']}, which holds one adapter; "
                "expected a folder that load_adapter() and save_adapter() have written anew"
            )
        record = Record.from_fields(fields, folder / CONFIG_FILE)
        tensors, metadata = read_tensors(folder / SUBSPACE_FILE)
        if metadata.get("digest") != record.subspace:
            raise ValueError(
                f"{CONFIG_FILE} and {SUBSPACE_FILE} in {folder} do not belong together; one of "
                "them is of another save, which may have been interrupted"
            )
        if digest_of(tensors) != record.subspace:
            raise ValueError(f"{folder / SUBSPACE_FILE} is damaged: its digest is another")
        return cls(folder, record, tensors, None if Path(source).is_dir() else str(source))

    def read(self, directory: str | Path) -> dict[str, torch.Tensor]:
        """The trained tensors in the folder of an adapter of this subspace, on the CPU.

        Returns:
            by their names in the model: `<layer>.lora_R` [r, r] (`lora_A` and `lora_B` for
            LoRA), and the tensors of the modules trained whole.

        Warns:
            UntrainedAdapterWarning: the adapter was saved before it was trained.
            UnreachedLayerWarning: training never reached some of its layers.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged or belongs to another subspace.
        """
        path = Path(directory) / ADAPTER_FILE
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not an adapter of format {FORMAT}")
        if metadata.get("digest") != digest_of(tensors):
            raise ValueError(f"{path} is damaged: its digest is another")
        if metadata.get("fingerprint") != self.record.fingerprint:
            raise ValueError(
                f"{path} and {self.folder / CONFIG_FILE} do not belong together: the adapter was "
                "trained with another subspace or other settings, or a save was interrupted"
            )
        if "untrained" in metadata:
            warnings.warn(
                f"{path.parent} holds an adapter as it was before training",
                UntrainedAdapterWarning,
                stacklevel=2,
            )
        if "unreached" in metadata:
            warnings.warn(
                f"{path.parent}: training never reached the layers {metadata['unreached'][:300]}, "
                "though their adapters are not zero; merging them may change the model",
                UnreachedLayerWarning,
                stacklevel=2,
            )
        try:
            return unpack_cores(tensors, self.record.layers, self.record.config.r)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def is_untrained(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter that is marked as saved before training."""
    try:
        with safe_open(Path(folder) / ADAPTER_FILE, "pt") as file:
            return "untrained" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_adapter(
    source: str | Path, revision: str | None = None, subspace: "str | Path | Subspace | None" = None
) -> tuple[Subspace, dict[str, torch.Tensor]]:
    """Reads an adapter and the subspace it belongs to, checked against each other.

    Args:
        source: folder or hub repository of the adapter.
        revision: branch, tag or commit of the repository.
        subspace: where the subspace is, or the subspace; by default beside the adapter, or where
            the adapter says. A hub repository that an adapter on disk names is not fetched.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged or do not belong together.
    """
    directory = local_folder(source, (CONFIG_FILE, SUBSPACE_FILE, ADAPTER_FILE), revision)
    if isinstance(subspace, Subspace):
        return subspace, subspace.read(directory)
    if subspace is None:
        if not (directory / ADAPTER_FILE).is_file():
            raise FileNotFoundError(
                f"{directory / ADAPTER_FILE} is missing; expected a file that save_adapter wrote"
            )
        if (directory / CONFIG_FILE).is_file():
            subspace = directory
            fields = read_fields(directory)
            if fields["format"] == "1":
                return _of_format_1(directory, fields)
        else:
            subspace = _stated_place(directory, on_hub=not Path(source).is_dir())
    subspace = Subspace.load(subspace)
    return subspace, subspace.read(directory)


def _of_format_1(directory: Path, fields: dict) -> tuple[Subspace, dict[str, torch.Tensor]]:
    record, trained, tensors = format_1.read(
        directory / CONFIG_FILE, directory / ADAPTER_FILE, directory / SUBSPACE_FILE, fields
    )
    return Subspace(directory, record, tensors), trained


def _stated_place(directory: Path, on_hub: bool) -> str | Path:
    """Where an adapter in a folder of its own says that its subspace is."""
    _, metadata = read_tensors(directory / ADAPTER_FILE)
    place = metadata.get("subspace")
    if place is None:
        raise FileNotFoundError(
            f"{directory / CONFIG_FILE} is missing; expected a file that save_adapter wrote"
        )
    if os.path.isdir(directory / place):
        return directory / place
    # A file on disk must not make this machine fetch something: whoever loads it says so.
    if on_hub:
        return place
    raise FileNotFoundError(
        f"{directory} holds an adapter without its subspace, which was saved in {place[:200]!r} "
        "(relative to the adapter, or a hub repository) and is not there; expected subspace=, "
        "the folder or the hub repository that holds it"
    )


__all__ = [
    "ADAPTER_FILE",
    "SUBSPACE_FILE",
    "Subspace",
    "UntrainedAdapterWarning",
    "is_untrained",
    "read_adapter",
]
