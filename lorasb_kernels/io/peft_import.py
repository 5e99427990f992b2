"""Adapters in peft's format: import of LoRA, and of the published codes' R.

The published LoRA-SB and LoRA-XS code saves a peft LoRA directory with one more tensor per layer,
R, the weight of a module `default_lora_latent_mapping`. Older peft strips `.default` from the name
on saving, which leaves `q_proj_lora_latent_mapping.weight`; newer peft keeps
`q_proj.default_lora_latent_mapping.weight`. When peft itself loads such a file, it ignores
this tensor without a warning and computes `B·A`.
"""

import re
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.peft_names import CONFIG_FILE, PREFIX, TENSORS_FILE, shortest_names
from lorasb_kernels.io.peft_settings import read_settings
from lorasb_kernels.io.pretrained import save_adapter_only
from lorasb_kernels.io.tensors import check_tensors, read_tensors, saved_tensors
from lorasb_kernels.nn.install import install, new_layer
from lorasb_kernels.targets import (
    find_layers,
    find_saved_modules,
    matches_suffix,
    refuse_adapted,
)

_CORE = re.compile(r"(.+?)(?:\.default_|\.|_)lora_latent_mapping\.weight")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight")


def import_peft(
    model: nn.Module,
    directory: str | Path,
    revision: str | None = None,
    *,
    plain_lora: bool = False,
) -> nn.Module:
    """Adapts `model` with an adapter that peft or the published LoRA-SB or LoRA-XS code saved.

    The configuration of the result says `init="lora"` for plain LoRA and `init="lora-sb"` for
    both other methods: A and B come with the adapter, so `save_adapter` stores them.

    Args:
        model: the plain base model.
        directory: folder or hub repository with `adapter_config.json` and
            `adapter_model.safetensors`.
        revision: branch, tag or commit of a hub repository.
        plain_lora: read a LoRA adapter, which has only A and B. This must be stated, because files
            of the published code look the same after peft has saved them again without R.

    Returns:
        `model`, adapted in place. If anything raises, it is as it was.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a layer without A or B, without R (with R, if `plain_lora`), tensors that
            fit no module, wrong shapes, non-finite values, a LoRA variant (DoRA, aLoRA, trained
            biases, ranks by layer) that has no counterpart here, or an initialization that
            changed the base model (PiSSA, OLoRA, LoftQ) and was not converted by peft.
    """
    refuse_adapted(model)
    directory = local_folder(directory, (CONFIG_FILE, TENSORS_FILE), revision)
    peft_config = read_settings(directory / CONFIG_FILE)
    tensors, _ = read_tensors(directory / TENSORS_FILE)
    factors, others = _split(tensors)
    _check_complete(directory / TENSORS_FILE, factors, plain_lora)
    try:
        config = _configuration(model, peft_config, factors, plain_lora)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error
    targets = find_layers(model, tuple(factors), config.r, config.modules_to_save)
    layers = {name: new_layer(linear, config) for name, linear in targets.items()}
    found = {f"{n}.{part}": t for n, parts in factors.items() for part, t in parts.items()}
    expected = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in layers.items()
        for part in (("lora_A", "lora_B") if plain_lora else ("lora_A", "lora_R", "lora_B"))
    }
    saved = find_saved_modules(model, config.modules_to_save)
    check_tensors(directory / TENSORS_FILE, found | others, expected | saved_tensors(saved))
    for name, layer in layers.items():
        parts = factors[name]
        layer.set_adapter(parts["lora_A"], parts.get("lora_R"), parts["lora_B"])
    with torch.no_grad():
        for name, tensor in saved_tensors(saved).items():
            tensor.copy_(others[name])
    install(model, layers, saved, config)
    save_adapter_only(model)
    return model


def _split(tensors: dict) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The factors by layer, and the tensors of modules trained whole by their names."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        if match := _CORE.fullmatch(key):
            factors.setdefault(match[1], {})["lora_R"] = tensor
        elif match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key)] = tensor
    return factors, others


def _check_complete(
    path: Path, factors: dict[str, dict[str, torch.Tensor]], plain_lora: bool
) -> None:
    if not factors:
        raise ValueError(f"{path} holds no adapter; expected lora_A, lora_B and R of some layers")
    for name, parts in factors.items():
        for part in ("lora_A", "lora_B"):
            if part not in parts:
                raise ValueError(f"{path}: {name} has no {part}; expected A and B of every layer")
        if plain_lora and "lora_R" in parts:
            raise ValueError(
                f"{path}: {name} has an R (lora_latent_mapping); expected none with plain_lora=True"
            )
        if not plain_lora and "lora_R" not in parts:
            raise ValueError(
                f"{path}: {name} has lora_A and lora_B but no R (lora_latent_mapping). This is a "
                "plain LoRA adapter, which plain_lora=True reads, or its R was dropped on saving; "
                "expected R of every layer"
            )
        for part, tensor in parts.items():
            if tensor.dim() != 2:
                shape = tuple(tensor.shape)
                raise ValueError(f"{path}: {part} of {name} has shape {shape}; expected a matrix")


def _configuration(
    model: nn.Module, peft_config: dict, factors: dict, plain_lora: bool
) -> LoRASBConfig:
    r = next(iter(factors.values()))["lora_A"].shape[0]
    modules = [name for name, _ in model.named_modules()]
    # peft lists heads of every kind ("classifier", "score"); only those in this model are used.
    saved = tuple(
        suffix
        for suffix in peft_config.get("modules_to_save") or ()
        if any(matches_suffix(name, (suffix,)) for name in modules)
    )
    return LoRASBConfig(
        r=r,
        target_modules=tuple(shortest_names(model, list(factors))),
        init="lora" if plain_lora else "lora-sb",
        lora_alpha=peft_config["lora_alpha"],
        use_rslora=bool(peft_config.get("use_rslora")),
        dropout=peft_config.get("lora_dropout") or 0.0,
        modules_to_save=saved,
    )


__all__ = ["import_peft"]
