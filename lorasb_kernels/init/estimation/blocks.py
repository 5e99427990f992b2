"""The repeated blocks of a model: the parts that can be run and recomputed one at a time."""

from collections.abc import Iterable

from torch import nn


def find_blocks(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """The elements of the outermost module lists that contain `layers`, by name.

    An encoder-decoder has two such lists; a block may serve several layers (ALBERT).

    Args:
        model: the model.
        layers: names of layers.
    """
    blocks: dict[str, nn.Module] = {}
    for name in layers:
        parent, path = model, []
        for part in name.split("."):
            path.append(part)
            child = parent.get_submodule(part)
            if isinstance(parent, nn.ModuleList):
                blocks[".".join(path)] = child
                break
            parent = child
    return blocks


__all__ = ["find_blocks"]
