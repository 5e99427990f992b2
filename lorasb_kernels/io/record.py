"""`lorasb_config.json`: what an adapter is, and the fingerprint that its files share.

    format        "2"
    fingerprint   SHA-256 over config, layers, quantization and subspace below
    subspace      digest of the tensors in subspace.safetensors
    base_model    name of the base model; a hint for messages, not part of the fingerprint
    quantization  kinds of quantized weights the adapter was made on
    layers        full names of the adapted layers, in the order in which their R's are packed
    transposed    those of them whose weight the base model stores as [n, m] (GPT-2); if any
    config        the fields of `LoRASBConfig`

The fingerprint covers A, B and the configuration, so a changed `lora_alpha` is found like a changed
bit of A. The layers are named in full: loading evaluates no regular expression of a file.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.utils.files import read_json, write_json

CONFIG_FILE = "lorasb_config.json"
FORMAT = "2"
_COVERED = ("config", "layers", "quantization", "subspace")
_COVERED_IF_ANY = ("transposed",)


@dataclass(frozen=True)
class Record:
    """The content of `lorasb_config.json`, checked."""

    config: LoRASBConfig
    layers: tuple[str, ...]
    quantization: tuple[str, ...]
    subspace: str
    base_model: str | None
    fingerprint: str
    transposed: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: LoRASBConfig,
        layers: tuple[str, ...],
        quantization: tuple[str, ...],
        subspace: str,
        base_model: str | None,
        transposed: tuple[str, ...] = (),
    ) -> "Record":
        """The record of an adapter to save, with its fingerprint."""
        record = cls(config, layers, quantization, subspace, base_model, "", transposed)
        return dataclasses.replace(record, fingerprint=fingerprint_of(record._fields()))

    @classmethod
    def from_fields(cls, fields: dict, path: Path) -> "Record":
        """Checks the content of a record file of format 2.

        Raises:
            ValueError: a missing or wrong field, or a fingerprint that is not of these fields.
        """
        if not isinstance(fields.get("subspace"), str) or not isinstance(
            fields.get("fingerprint"), str
        ):
            raise ValueError(f"{path} lacks 'subspace' or 'fingerprint'")
        for name in ("layers", "quantization", "transposed"):
            value = fields.get(name, [] if name in _COVERED_IF_ANY else None)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{path}: {name} is {str(value)[:200]}; expected a list of names")
            if len(set(value)) != len(value):
                raise ValueError(f"{path}: {name} has a name twice; expected each once")
        config, base_model = read_config(fields, path), read_base_model(fields, path)
        if fingerprint_of(fields) != fields["fingerprint"]:
            raise ValueError(
                f"{path} is not as it was saved: its fingerprint is another. Settings are changed "
                "by loading the adapter, changing them and saving it"
            )
        return cls(
            config,
            tuple(fields["layers"]),
            tuple(fields["quantization"]),
            fields["subspace"],
            base_model,
            fields["fingerprint"],
            tuple(fields.get("transposed", ())),
        )

    def write(self, directory: Path) -> None:
        """Writes `lorasb_config.json`, atomically."""
        covered = self._fields()
        write_json(
            directory / CONFIG_FILE,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "subspace": covered["subspace"],
                "base_model": self.base_model,
                "quantization": covered["quantization"],
                "layers": covered["layers"],
                **{name: covered[name] for name in _COVERED_IF_ANY if name in covered},
                "config": covered["config"],
            },
        )

    def _fields(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "quantization": list(self.quantization),
            "subspace": self.subspace,
        } | ({"transposed": list(self.transposed)} if self.transposed else {})


def fingerprint_of(fields: dict) -> str:
    """SHA-256 over the fields of a record that decide what the adapter computes.

    Over the values in the file, so that a later version with more settings finds the same.
    """
    names = (*_COVERED, *(name for name in _COVERED_IF_ANY if name in fields))
    covered = {name: fields[name] for name in names}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def read_fields(directory: Path) -> dict:
    """The fields in `lorasb_config.json`, of whatever format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object of a known format.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a file that save_adapter wrote")
    fields = read_json(path)
    if not isinstance(fields, dict) or fields.get("format") not in ("1", FORMAT):
        raise ValueError(f"{path} is not an adapter record of format 1 or {FORMAT}")
    if not isinstance(fields.get("config"), dict):
        raise ValueError(f"{path} lacks 'config'")
    return fields


def read_config(fields: dict, path: Path) -> LoRASBConfig:
    """The configuration in a record; ValueError with the file's name if it is none."""
    try:
        return LoRASBConfig.from_dict(fields["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_base_model(fields: dict, path: Path) -> str | None:
    """The name of the base model in a record; ValueError if it is no name."""
    name = fields.get("base_model")
    if not isinstance(name, str | None):
        raise ValueError(f"{path}: base_model is {str(name)[:200]}; expected a name or null")
    return name


__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "Record",
    "fingerprint_of",
    "read_base_model",
    "read_config",
    "read_fields",
]
