"""Strategy `grouped`: as many layers at a time as the memory budget allows.

For models whose blocks cannot be run alone. Memory: the budget. Work: one forward and one
backward per micro-batch and group.
"""

from collections.abc import Iterator

import torch

from lorasb_kernels.init.estimation.memory import accumulator_bytes
from lorasb_kernels.init.estimation.resident import accumulate
from lorasb_kernels.init.estimation.sums import Estimation


def grouped(
    estimation: Estimation, names: list[str], budget: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each of `names` with its summed gradient.

    Args:
        estimation: what to estimate.
        names: the layers.
        budget: bytes of accumulators at a time; None for no limit.
    """
    groups = list(_groups(estimation, names, budget))
    bar = estimation.bar(len(groups) * len(estimation.batches), "grouped")
    try:
        for group in groups:
            accumulate(estimation, group, bar)
            for name in group:
                yield name, estimation.finish(name)
    finally:
        bar.close()


def _groups(estimation: Estimation, names: list[str], budget: int | None) -> Iterator[list[str]]:
    group, size = [], 0
    for name in names:
        needed = accumulator_bytes(estimation.layers[name])
        if group and budget is not None and size + needed > budget:
            yield group
            group, size = [], 0
        group.append(name)
        size += needed
    yield group


__all__ = ["grouped"]
