"""Adapters in peft's format: export to plain LoRA; import of LoRA and of the published codes' R.

    s·B·R·A x  =  B' A' x      with  A' = R·A [r, n]  and  B' = s·B [m, r]

so an adapter of this library is a LoRA adapter of the same rank with `lora_alpha = r`, and
whatever serves LoRA (peft, vLLM, SGLang, llama.cpp) serves it. The r² trained numbers become
r·(m + n); LoRA's stay as many.

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

from lorasb_kernels.adaptation import install, new_layer
from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.io.tensors import check_tensors, read_tensors, saved_tensors
from lorasb_kernels.targets import (
    check_adaptable,
    find_saved_modules,
    find_targets,
    layers_of,
    matches_suffix,
    refuse_adapted,
)
from lorasb_kernels.utils.files import read_json, write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_CORE = re.compile(r"(.+?)(?:\.default_|\.|_)lora_latent_mapping\.weight")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight")
_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}
EXPORT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def export_peft(
    model: nn.Module,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    saved_modules: bool = True,
) -> None:
    """Writes the adapters of `model` as a LoRA adapter in peft's format.

    `A' = R·A` (A, without a core) and `B' = s·B` are computed in fp32 and rounded once to `dtype`.

    Args:
        model: an adapted model.
        directory: created if missing; gets `adapter_config.json` and
            `adapter_model.safetensors`.
        dtype: dtype of the written factors, fp32, fp16 or bf16.
        saved_modules: write the modules of `modules_to_save` too. Servers that take only
            LoRA (vLLM) refuse them; without them the trained head is not exported.

    Raises:
        ValueError: the model holds no adapter, a layer is merged, a factor is not finite (or
            not in `dtype`), or `dtype` is none of the three.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, EXPORT_DTYPES))}")
    layers = layers_of(model)
    tensors = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; expected unmerge() before exporting")
        lora_A, lora_B = layer.plain_lora()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}; nothing was written")
    suffixes = model.lorasb_config.modules_to_save if saved_modules else ()
    for name, module in find_saved_modules(model, suffixes).items():
        for key, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    directory = Path(directory)
    write_tensors(directory / TENSORS_FILE, tensors, {"format": "pt"})
    config = _peft_config(model, list(layers), model.lorasb_config.r, suffixes)
    write_json(directory / CONFIG_FILE, config)


def _peft_config(model: nn.Module, names: list[str], r: int, suffixes: tuple[str, ...]) -> dict:
    base_config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": shortest_names(model, names),
        "modules_to_save": list(suffixes) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Suffixes that select the modules `names` of `model` and no other, shortest first choice.

    The last components if they select nothing else, otherwise the full names.
    """
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    selected = {name for name, _ in model.named_modules() if matches_suffix(name, tuple(suffixes))}
    return suffixes if selected == set(names) else sorted(names)


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
            fit no module, wrong shapes, non-finite values, or a LoRA variant (DoRA, trained
            biases, ranks by layer) that has no counterpart here.
    """
    refuse_adapted(model)
    directory = local_folder(directory, (CONFIG_FILE, TENSORS_FILE), revision)
    peft_config = _read_config(directory / CONFIG_FILE)
    tensors, _ = read_tensors(directory / TENSORS_FILE)
    factors, others = _split(tensors)
    _check_complete(directory / TENSORS_FILE, factors, plain_lora)
    try:
        config = _configuration(model, peft_config, factors, plain_lora)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error
    targets = find_targets(model, config.target_modules, config.modules_to_save)
    check_adaptable(model, targets, config.r)
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
        layer.set_adapter(**{"lora_R": None, **factors[name]})
    with torch.no_grad():
        for name, tensor in saved_tensors(saved).items():
            tensor.copy_(others[name])
    install(model, layers, saved, config)
    return model


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a folder that peft saved")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected peft's settings")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; expected 'LORA'")
    for name, plain in _UNSUPPORTED.items():
        if (config.get(name) or plain) != plain:
            raise ValueError(f"{path}: {name} is {config[name]!r}; expected {plain!r}")
    alpha, saved = config.get("lora_alpha"), config.get("modules_to_save") or []
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{path}: lora_alpha is {alpha!r}; expected a number")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: modules_to_save is {saved!r}; expected names of modules")
    return config


def _split(tensors: dict) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The factors by layer, and the tensors of modules trained whole by their names."""
    factors, others = {}, {}
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


__all__ = ["export_peft", "import_peft", "shortest_names"]
