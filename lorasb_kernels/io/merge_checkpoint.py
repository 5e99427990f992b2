"""Merging an adapter into a model on disk, shard by shard.

    W' = round(W + s·B·R·A)     product and sum in fp32, one rounding to the dtype of W

For LoRA without R.

No model is built: each safetensors file of the base is read, its adapted weights changed, and
written under the same name, so the memory needed is that of the largest file.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorasb_kernels.io.base_check import check_base
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.lora_xs import check_rebuilt, factor_probes, rebuild_factors
from lorasb_kernels.io.subspace import read_adapter
from lorasb_kernels.io.tensors import check_tensors
from lorasb_kernels.nn.merging import delta_weight, merged_weight
from lorasb_kernels.utils.files import atomic_folder, read_json, write_tensors
from lorasb_kernels.utils.progress import progress_bar

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# Configuration, tokenizer, chat template and custom code; no weights in other formats.
COPIED = (".json", ".txt", ".model", ".jinja", ".py")


def merge_checkpoint(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    progress: bool = True,
) -> None:
    """Writes the base model with the adapter merged in, as a plain Hugging Face model.

    Args:
        model: folder or hub id of the base model, in safetensors files.
        adapter: folder or hub id of what `save_adapter` wrote.
        output: new folder; it is written completely or not at all.
        progress: show a progress bar.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: a folder or file is missing, or the base has no safetensors files.
        ValueError: a damaged adapter, another base model, a merged weight that is not finite,
            or trained modules that the base model does not hold (a new classification head):
            merge those in memory with `merge_and_unload` and `save_pretrained`.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output is {str(output)!r}, which exists; expected a new folder")
    merger = _Merger(adapter)
    source = local_folder(model, (*(f"*{suffix}" for suffix in COPIED), "*.safetensors"))
    shards = _shards(source)
    merger.locate([key for keys in shards.values() for key in keys])
    bar = progress_bar(sum(map(len, shards.values())), "merging", "tensor", progress)
    with atomic_folder(output) as building:
        for file, keys in shards.items():
            with _opened(source / file) as shard:
                metadata = shard.metadata()
                tensors = {}
                for key in keys:
                    tensors[key] = merger.merged(key, shard.get_tensor(key))
                    bar.update()
            write_tensors(building / file, tensors, metadata)
        for path in source.iterdir():
            if path.suffix in COPIED and path.is_file():
                shutil.copyfile(path, building / path.name)
    bar.close()


class _Merger:
    """What the adapter in a folder changes in the base model's tensors."""

    def __init__(self, adapter: str | Path):
        self.directory = Path(adapter)
        stored, self.trained = read_adapter(adapter)
        self.config, self.subspace = stored.record.config, stored.tensors
        self.names, self.base_model = stored.record.layers, stored.record.base_model
        self.transposed = frozenset(stored.record.transposed)
        self.trained_on_plain_weights = not stored.record.quantization
        self.layers: dict[str, str] = {}  # key in the base model -> layer
        self.replaced: dict[str, torch.Tensor] = {}  # key in the base model -> trained tensor

    def locate(self, keys: list[str]) -> None:
        """Finds the tensor of the base model behind each tensor of the adapter."""
        self.keys = frozenset(keys)
        for layer in self.names:
            self.layers[_key_of(f"{layer}.weight", keys)] = layer
        if not self.names or len(self.layers) != len(self.names):
            raise ValueError(
                f"{self.directory} has {len(self.names)} adapted layers, which are "
                f"{len(self.layers)} weights of the base model; expected one weight each"
            )
        factors = {f"{n}.{f}" for n in self.names for f in ("lora_A", "lora_R", "lora_B")}
        for name, tensor in self.trained.items():
            if name not in factors:
                self.replaced[_key_of(name, keys)] = tensor

    def merged(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor to write instead of `tensor`, in its dtype."""
        if key in self.replaced:
            check_tensors(self.directory, {key: self.replaced[key]}, {key: tensor})
            return self.replaced[key].to(tensor.dtype)
        if key not in self.layers:
            return tensor
        name = self.layers[key]
        if not tensor.is_floating_point() or f"{key}.absmax" in self.keys:
            raise ValueError(
                f"{key} has dtype {tensor.dtype}, so the base model is quantized; expected the "
                "model it was quantized from, to merge into without rounding the adapter away"
            )
        if tensor.dim() != 2:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}; expected a matrix")
        weight = tensor.T if name in self.transposed else tensor
        lora_A, lora_B = self._factors(name, weight)
        core = self.trained.get(f"{name}.lora_R")
        if core is None and self.config.facts.has_core:
            raise ValueError(f"{self.directory} lacks lora_R of {name}")
        self._check_factors(name, weight, {"lora_A": lora_A, "lora_B": lora_B, "lora_R": core})
        result = merged_weight(weight, delta_weight(lora_A, core, lora_B, self.config.s))
        if not result.isfinite().all():
            raise ValueError(f"{key} would not be finite; nothing was written")
        return result.T.contiguous() if name in self.transposed else result

    def _check_factors(self, name: str, weight: torch.Tensor, factors: dict) -> None:
        (m, n), r = weight.shape, self.config.r
        shapes = {"lora_A": (r, n), "lora_B": (m, r), "lora_R": (r, r)}
        found = {f"{name}.{f}": tensor for f, tensor in factors.items() if tensor is not None}
        expected = {k: torch.empty(shapes[k.rpartition(".")[2]], device="meta") for k in found}
        check_tensors(self.directory, found, expected)

    def _factors(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.facts.rebuilt:  # rounded to the dtype of the weight, as in a layer
            rebuilt = rebuild_factors(name, weight, self.config)
            lora_A, lora_B = (factor.to(weight.dtype) for factor in rebuilt)
            own = factor_probes(name, lora_A, lora_B)
            stored = {probe: self.subspace[probe] for probe in own if probe in self.subspace}
            check_tensors(self.directory, stored, own)
            check_rebuilt(own, stored, self.base_model)
            return lora_A, lora_B
        check_base(name, weight, self.subspace, self.base_model, self.trained_on_plain_weights)
        tensors = self.subspace | self.trained
        if not {f"{name}.lora_A", f"{name}.lora_B"} <= tensors.keys():
            raise ValueError(f"{self.directory} lacks lora_A or lora_B of {name}")
        return tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]


def _shards(source: Path) -> dict[str, list[str]]:
    """The tensors in each safetensors file of a model."""
    index = source / INDEX_FILE
    if index.is_file():
        shards: dict[str, list[str]] = {}
        for key, file in _weight_map(index).items():
            shards.setdefault(file, []).append(key)
        return shards
    if not (source / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{source} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; expected a model in "
            "safetensors files (pickled .bin files are not read)"
        )
    with _opened(source / WEIGHTS_FILE) as weights:
        return {WEIGHTS_FILE: list(weights.keys())}


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; all files are in the folder of the index."""
    record = read_json(index)
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map'; expected the index of a model")
    for key, file in weight_map.items():
        # They are written under the same names: a name with a folder in it could lead anywhere.
        beside = isinstance(file, str) and Path(file).name == file
        if not (beside and file.endswith(".safetensors") and (index.parent / file).is_file()):
            raise ValueError(
                f"{index}: {key} is in {file!r}; expected the name of a file beside it"
            )
    return weight_map


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; ValueError with its name if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _key_of(name: str, keys: list[str]) -> str:
    """The key of the tensor that a loaded model calls `name`.

    A checkpoint of a bare model lacks the prefix that a model with a head adds, and vice versa.
    """
    known = set(keys)
    parts = name.split(".")
    for start in range(len(parts) - 1):
        if (shorter := ".".join(parts[start:])) in known:
            return shorter
    longer = [key for key in keys if key.endswith(f".{name}")]
    if len(longer) == 1:
        return longer[0]
    raise ValueError(
        f"the base model holds no tensor for {name}; expected one. Where the model is saved "
        "under other names than it has in memory, or the head is new, use load_adapter, "
        "merge_and_unload and save_pretrained"
    )


__all__ = ["merge_checkpoint"]
