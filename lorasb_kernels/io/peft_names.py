"""Names in peft's format: files, tensors and target modules."""

from torch import nn

from lorasb_kernels.targets import matches_suffix

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Suffixes that select the modules `names` of `model` and no other, shortest first choice.

    The last components if they select nothing else, otherwise the full names.
    """
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    selected = {name for name, _ in model.named_modules() if matches_suffix(name, tuple(suffixes))}
    return suffixes if selected == set(names) else sorted(names)


__all__ = ["CONFIG_FILE", "PREFIX", "TENSORS_FILE", "shortest_names"]
