"""Adapters in peft's format: export to plain LoRA.

    s·B·R·A x  =  B' A' x      with  A' = R·A [r, n]  and  B' = s·B [m, r]

so an adapter of this library is a LoRA adapter of the same rank with `lora_alpha = r`, and
whatever serves LoRA (peft, vLLM, SGLang, llama.cpp) serves it. The r² trained numbers become
r·(m + n); LoRA's stay as many.
"""

import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
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

# What vLLM's `--max-lora-rank` may be (0.32), and the modules it takes whole.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_MODULES = ("score", "classifier")


class ServingWarning(UserWarning):
    """A server that reads LoRA will not take all of what was exported."""


@torch.no_grad()
def export_peft(
    model: nn.Module,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    saved_modules: bool = True,
    *,
    rank: int | Literal["vllm"] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes the adapters of `model` as a LoRA adapter in peft's format.

    `A' = R·A` (A, without a core) and `B' = s·B` are computed in fp32 and rounded once to `dtype`.

    Args:
        model: an adapted model.
        directory: created if missing; gets `adapter_config.json` and
            `adapter_model.safetensors`.
        dtype: dtype of the written factors, fp32, fp16 or bf16.
        saved_modules: write the modules of `modules_to_save` too. vLLM takes `score` and
            `classifier` and refuses others, llama.cpp takes none; without them the trained head
            is not exported.
        rank: of the written factors, at least r: rows of A' and columns of B' that are 0 make up
            the difference, which changes no output. `"vllm"`: the smallest that its
            `--max-lora-rank` can be. Default r.
        base_model: hub name or folder to write as `base_model_name_or_path`, which vLLM's
            resolver compares and llama.cpp looks up. Default: where `model` was loaded from.

    Raises:
        ValueError: the model holds no adapter, a layer is merged, a factor is not finite (or
            not in `dtype`), `dtype` is none of the three, or `rank` is below r or unknown.

    Warns:
        ServingWarning: a rank or a whole module that vLLM or llama.cpp does not take.
    """
    if dtype not in FACTOR_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, FACTOR_DTYPES))}")
    layers = layers_of(model)
    r = config_of(model).r
    written_rank = _written_rank(r, rank)
    tensors = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; expected unmerge() before exporting")
        lora_A, lora_B = layer.plain_lora()
        zeros = written_rank - r
        tensors[f"{PREFIX}{name}.lora_A.weight"] = F.pad(lora_A, (0, 0, 0, zeros))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = F.pad(lora_B, (0, zeros))
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
    config = _peft_config(model, layers, written_rank, suffixes)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    write_json(directory / CONFIG_FILE, config)
    for problem in _serving_problems(written_rank, suffixes):
        warnings.warn(problem, ServingWarning, stacklevel=2)


def _serving_problems(rank: int, saved_modules: tuple[str, ...]) -> list[str]:
    problems = []
    if rank > VLLM_RANKS[-1]:
        problems.append(
            f"vLLM will refuse the adapter: its rank is {rank}, and --max-lora-rank ends at "
            f"{VLLM_RANKS[-1]}; a merged model has no such limit"
        )
    whole = [name for name in saved_modules if name.split(".")[-1] not in VLLM_MODULES]
    if whole:
        problems.append(
            f"vLLM will refuse the adapter for the whole modules {', '.join(whole)}, and "
            f"llama.cpp leaves such modules out, norms without a word; vLLM takes "
            f"{' and '.join(VLLM_MODULES)}. Merge, or export with saved_modules=False"
        )
    return problems


def _written_rank(r: int, rank: int | str | None) -> int:
    if rank is None:
        return r
    if rank == "vllm":
        return next((allowed for allowed in VLLM_RANKS if allowed >= r), r)
    if not isinstance(rank, int) or rank < r:
        raise ValueError(f'rank is {rank!r}; expected "vllm" or an integer of at least r = {r}')
    return rank


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


__all__ = ["ServingWarning", "export_peft"]
