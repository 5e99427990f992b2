"""Adapters in peft's format: export to plain LoRA.

    s·B·R·A x  =  B' A' x      with  A' = R·A [r, n]  and  B' = s·B [m, r]

so an adapter of this library is a LoRA adapter of the same rank with `lora_alpha = r`, and
whatever serves LoRA (peft, vLLM, SGLang, llama.cpp) serves it. The r² trained numbers become
r·(m + n); LoRA's stay as many.
"""

from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.io.peft_names import CONFIG_FILE, PREFIX, TENSORS_FILE, shortest_names
from lorasb_kernels.io.tensors import FACTOR_DTYPES
from lorasb_kernels.linear_layers import stores_transposed
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.targets import config_of, find_saved_modules, layers_of
from lorasb_kernels.utils.files import write_json, write_tensors

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


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
    if dtype not in FACTOR_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, FACTOR_DTYPES))}")
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
    suffixes = config_of(model).modules_to_save if saved_modules else ()
    for name, module in find_saved_modules(model, suffixes).items():
        for key, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    directory = Path(directory)
    write_tensors(directory / TENSORS_FILE, tensors, {"format": "pt"})
    config = _peft_config(model, layers, config_of(model).r, suffixes)
    write_json(directory / CONFIG_FILE, config)


def _peft_config(
    model: nn.Module, layers: dict[str, AdaptedLinear], r: int, suffixes: tuple[str, ...]
) -> dict:
    base_config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": shortest_names(model, list(layers)),
        "modules_to_save": list(suffixes) or None,
        "bias": "none",
        "fan_in_fan_out": all(map(stores_transposed, layers.values())),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


__all__ = ["export_peft"]
