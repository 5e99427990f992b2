"""peft's methods that change the base weights, saved as LoRA for the original base.

PiSSA and LoRA-GA start with A₀ and B₀ that are not zero and subtract s·B₀A₀ from W, so that A and B
fit only the changed W. For the original W the trained adapter is

    s·(B A − B₀A₀) = s·[B, −B₀]·[A; A₀]

LoRA of rank 2r with the same s. peft's own conversion (`path_initial_model_for_weight_conversion`)
does the same but drops the modules trained whole.
"""

from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.utils.files import read_json, write_json, write_tensors

METHODS = ("pissa", "lora-ga")
START_FILE = "start.safetensors"


def keep_start(model: nn.Module, output_dir: Path) -> None:
    """Writes A₀ and B₀ of a new peft model to `output_dir`."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model)
    factors = {name: t for name, t in tensors.items() if ".lora_A." in name or ".lora_B." in name}
    write_tensors(output_dir / START_FILE, factors, {"format": "pt"})


def save_converted(model: nn.Module, folder: Path, output_dir: Path) -> None:
    """Saves the adapter of a peft model in `folder` as LoRA for the original base.

    Args:
        model: the trained peft model.
        folder: gets peft's two files.
        output_dir: where `keep_start` wrote A₀ and B₀.
    """
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    start = load_file(output_dir / START_FILE)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, first in start.items():
        trained = tensors[name]
        is_a = ".lora_A." in name
        parts = [trained, first.to(trained.dtype) if is_a else -first.to(trained.dtype)]
        tensors[name] = torch.cat(parts, dim=0 if is_a else 1)
    settings = read_json(folder / "adapter_config.json")
    # α/r, or α/√r, stays s.
    settings["lora_alpha"] *= 2**0.5 if settings["use_rslora"] else 2
    settings |= {"r": 2 * settings["r"], "init_lora_weights": True, "lora_ga_config": None}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", settings)


__all__ = ["METHODS", "START_FILE", "keep_start", "save_converted"]
