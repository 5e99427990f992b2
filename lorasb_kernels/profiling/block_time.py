"""Predicted time of a block's adapted layers against the frozen ones, and of a training step."""

from collections.abc import Iterator, Sequence

from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.profiling.layer_time import (
    DTYPE,
    GROUP,
    Launch,
    elementwise,
    expand,
    projection,
    rank_gradient,
)
from lorasb_kernels.profiling.shapes import Layer, Preset

E = DTYPE.itemsize
# Share of the tensor cores' sustained rate in attention: FlashAttention-2's best on an A100 is 73 %
# of the datasheet (arXiv:2307.08691), less with short sequences and in the backward pass.
ATTENTION_SHARE = 0.5
# Passes over tensors between the products, forward and backward together, in activations of the
# width that they have: norms, rotary embedding, residual additions; the gate's product. Assumed.
HIDDEN_PASSES, INTERMEDIATE_PASSES = 36, 9


def frozen_launches(gpu: Gpu, groups: Sequence[Sequence[Layer]], M: int) -> Iterator[Launch]:
    """Forward and backward of frozen layers; autograd adds the input gradients of siblings."""
    for group in groups:
        for layer in group:
            yield Launch("gemm", "", gemm(gpu, M, layer.m, layer.n))
            yield Launch("gemm", "", gemm(gpu, M, layer.n, layer.m))
        for _ in group[1:]:
            yield elementwise(gpu, 3 * M * group[0].n * E)


def adapted_launches(
    gpu: Gpu, groups: Sequence[Sequence[Layer]], M: int, r: int, route: str, grouped: bool = False
) -> Iterator[Launch]:
    """Forward and backward of adapted layers.

    Args:
        gpu: where.
        groups: layers by the input that they read.
        M: tokens.
        r: rank.
        route: of `layer_time.ROUTES`.
        grouped: siblings share the projection of their input and add up their input gradients.
    """
    for group in groups:
        n, together = group[0].n, grouped and len(group) > 1
        if together:
            for first in range(0, len(group), GROUP):
                yield from projection(gpu, M, n, r, len(group[first : first + GROUP]))
        for layer in group:
            if not together:
                yield from projection(gpu, M, n, r)
            yield expand(gpu, M, layer.m, n, r, False, route)
            yield from projection(gpu, M, layer.m, r)
            yield from rank_gradient(gpu, M, r)
        if together:
            yield expand(gpu, M, n, group[0].m, r * len(group), True, route)
            for layer in group[1:]:
                yield Launch("gemm", "", gemm(gpu, M, n, layer.m, adds=True))
        else:
            for layer in group:
                yield expand(gpu, M, n, layer.m, r, True, route)
            for _ in group[1:]:
                yield elementwise(gpu, 3 * M * n * E)


def seconds(launches: Iterator[Launch]) -> float:
    """The time of launches one after another."""
    return sum(launch.limits.total for launch in launches)


def multiple(
    gpu: Gpu, groups: Sequence[Sequence[Layer]], M: int, r: int, route: str, grouped: bool = False
) -> float:
    """Predicted time of the adapted layers over that of the frozen ones, in a CUDA graph."""
    adapted = seconds(adapted_launches(gpu, groups, M, r, route, grouped))
    return adapted / seconds(frozen_launches(gpu, groups, M))


def training_tokens_per_second(
    model: Preset,
    gpu: Gpu,
    *,
    r: int,
    tokens: int = 8192,
    sequence: int = 512,
    recompute: bool = False,
) -> float:
    """PREDICTION: tokens per second of a training step of an adapted model, all linears adapted.

    Counts the linear layers by the rule's routes, the head over the vocabulary, attention, and the
    passes between; not the optimizer, which has r² numbers a layer, nor the host.

    Args:
        model: a preset.
        gpu: where.
        r: rank.
        tokens: M, of a micro-batch.
        sequence: tokens that attend to each other, causally.
        recompute: gradient checkpointing: each block's forward runs twice.
    """
    hidden = model.layers[0].n
    query, intermediate = model.layers[0].m, max(layer.m for layer in model.layers)
    linear = seconds(adapted_launches(gpu, model.groups, tokens, r, "rule"))
    # Forward 2 products of sequence × sequence / 2 per head, backward 5.
    attention = 7 * tokens * sequence * query / (ATTENTION_SHARE * gpu.rates.tensor)
    moved = E * tokens * (HIDDEN_PASSES * hidden + INTERMEDIATE_PASSES * intermediate)
    block = linear + attention + moved / gpu.rates.bandwidth
    # The forward pass is a half of the products, two sevenths of attention, a third of the passes.
    again = linear / 2 + 2 / 7 * attention + moved / gpu.rates.bandwidth / 3
    head = gemm(gpu, tokens, model.vocabulary, hidden).total
    head += gemm(gpu, tokens, hidden, model.vocabulary).total
    # The logits in fp32 and their gradient, each written and read.
    head += 4 * 4 * tokens * model.vocabulary / gpu.rates.bandwidth
    return tokens / (model.blocks * (block + recompute * again) + head)


__all__ = [
    "adapted_launches",
    "frozen_launches",
    "multiple",
    "seconds",
    "training_tokens_per_second",
]
