"""A preset as a model without weights, for what is computed from modules."""

import torch
from torch import nn

from lorasb_kernels.profiling.shapes import Preset


class Skeleton(nn.Module):
    """The linear layers, embedding and head of a preset on the meta device. It does not run.

    Args:
        preset: the model.
        dtype: of the weights.
    """

    def __init__(self, preset: Preset, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        hidden = preset.layers[0].n
        with torch.device("meta"):
            self.embedding = nn.Embedding(preset.vocabulary, hidden, dtype=dtype)
            self.layers = nn.ModuleList(_block(preset, dtype) for _ in range(preset.blocks))
            self.lm_head = nn.Linear(hidden, preset.vocabulary, bias=False, dtype=dtype)
        if preset.tied:
            self.lm_head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which is not adapted."""
        return self.lm_head


def _block(preset: Preset, dtype: torch.dtype) -> nn.Module:
    block = nn.Module()
    for layer in preset.layers:
        *path, name = layer.name.split(".")
        parent = block
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, nn.Linear(layer.n, layer.m, preset.bias, dtype=dtype))
    return block


__all__ = ["Skeleton"]
