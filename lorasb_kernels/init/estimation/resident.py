"""Strategy `resident`: the accumulators of all layers at once, in ordinary backward passes.

Memory: 4·m·n bytes per layer in addition to a training step. Work: one forward and one backward per
micro-batch. The fastest strategy if the accumulators fit.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import nn

from lorasb_kernels.init.estimation.blocks import find_blocks
from lorasb_kernels.init.estimation.frozen_eval import checkpointed
from lorasb_kernels.init.estimation.sums import Estimation


def resident(estimation: Estimation, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each of `names` with its summed gradient."""
    bar = estimation.bar(len(estimation.batches), "resident")
    try:
        accumulate(estimation, names, bar)
    finally:
        bar.close()
    for name in names:
        yield name, estimation.finish(name)


def accumulate(estimation: Estimation, names: list[str], bar) -> None:
    """Runs all micro-batches, leaving the sums of `names` in `estimation.sums`."""
    with estimation.step(names):
        estimation.sums.allocate(names)
        with _checkpointing_kept(estimation.model, estimation.layers):
            for index in range(len(estimation.batches)):
                estimation.loss(index).backward()
                bar.update()


def _checkpointing_kept(model: nn.Module, layers: dict[str, nn.Module]):
    """Gradient checkpointing of the model's blocks, if the model had it enabled."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return nullcontext()
    return checkpointed(find_blocks(model, layers).values())


__all__ = ["accumulate", "resident"]
