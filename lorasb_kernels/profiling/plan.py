"""Whether a model's initialization and training fit on a GPU, and how long they take, predicted."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.init.predict import InitPrediction, Rates, predict_init
from lorasb_kernels.profiling.block_time import training_tokens_per_second
from lorasb_kernels.profiling.shapes import Preset
from lorasb_kernels.profiling.skeleton import Skeleton
from lorasb_kernels.profiling.step_memory import (
    PRECISIONS,
    Precision,
    StepMemory,
    adapter_bytes,
    step_memory,
    weights_bytes,
)
from lorasb_kernels.targets import find_targets
from lorasb_kernels.utils.tables import markdown_table, size

# Assumed: the CUDA context, workspaces and the allocator's fragmentation take the rest.
USABLE = 0.9
NOTES = f"""Counted from shapes; nothing was run. {1 - USABLE:.0%} of the memory is left free
(assumed) for the CUDA context and fragmentation. 4-bit: bitsandbytes' NF4.
Attention keeps no scores (SDPA's fused kernels); every token is labelled."""


@dataclass(frozen=True)
class Work:
    """What is planned.

    Args:
        r: rank.
        batch: rows of a micro-batch.
        length: tokens of a row.
        rows: of an epoch.
        samples: rows that the initialization takes.
    """

    r: int = 96
    batch: int = 16
    length: int = 512
    rows: int = 10000
    samples: int = 32


@dataclass(frozen=True)
class InitMemory:
    """Bytes at the peak of the initialization on the device; `total` is their sum.

    Args:
        strategy: `resident` or `layerwise`, as `auto` chooses.
        weights: the frozen model.
        adapters: those of the layers that are done; all, at the end.
        sums: accumulators of gradients.
        boundaries: inputs of blocks.
        activations: of a micro-batch.
    """

    strategy: str
    weights: int
    adapters: int
    sums: int
    boundaries: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.adapters + self.sums + self.boundaries + self.activations


@dataclass(frozen=True)
class Option:
    """A precision with or without checkpointing.

    Args:
        precision: of the frozen weights.
        recompute: gradient checkpointing.
        training, init: memory at the planned batch.
        fits: whether both fit.
        largest: the most rows of a micro-batch with which both fit; 0 if none.
        tokens_per_second: of training at the planned batch.
    """

    precision: Precision
    recompute: bool
    training: StepMemory
    init: InitMemory
    fits: bool
    largest: int
    tokens_per_second: float

    @property
    def name(self) -> str:
        """As tables show it."""
        return self.precision.name + (", checkpointed" if self.recompute else "")


def init_memory(
    model: Preset, gpu: Gpu, precision: Precision, work: Work, batch: int
) -> InitMemory:
    """PREDICTION: memory of LoRA-SB's initialization with `batch` rows in a micro-batch.

    By the strategy that `auto` chooses: `resident` if its sums take at most half of what is free.
    """
    weights = weights_bytes(model, precision)
    adapters = adapter_bytes(model, precision, work.r)
    predicted = _predicted(model, gpu, precision, work, min(batch, work.samples))
    budget = max(0, usable(gpu) - weights) // 2
    found = []
    for one in predicted.strategies:
        # Inputs of blocks beyond the budget are kept in host memory.
        boundaries = min(one.boundaries, max(0, budget - one.accumulators))
        parts = (weights, adapters, one.accumulators, boundaries, one.activations)
        found.append(InitMemory(one.strategy, *parts))
    resident, layerwise = found
    takes_all = resident.sums <= budget and resident.total <= usable(gpu)
    return resident if takes_all else layerwise


@functools.lru_cache(maxsize=256)  # the search for the largest batch asks again
def _predicted(
    model: Preset, gpu: Gpu, precision: Precision, work: Work, micro_batch: int
) -> InitPrediction:
    skeleton = _skeleton(model, precision.dtype)
    return predict_init(
        skeleton,
        find_targets(skeleton, "all-linear"),
        r=work.r,
        samples=work.samples,
        tokens=work.length,
        micro_batch=micro_batch,
        rates=Rates.of(gpu, precision.dtype),
    )


@functools.lru_cache(maxsize=2)
def _skeleton(model: Preset, dtype: str) -> Skeleton:
    return Skeleton(model, getattr(torch, dtype))


def usable(gpu: Gpu) -> int:
    """Bytes that torch may allocate."""
    return int(USABLE * gpu.memory_gb * 1e9)


def tokens_per_second(
    model: Preset, gpu: Gpu, precision: Precision, work: Work, recompute: bool
) -> float:
    """PREDICTION by the performance model, which is one for 16 bits.

    In fp32 it is as many times slower as the datasheet's rate is lower; with quantized weights
    each product first reads the weight and writes it dequantized.
    """
    tokens = work.batch * work.length
    rate = training_tokens_per_second(
        model, gpu, r=work.r, tokens=tokens, sequence=work.length, recompute=recompute
    )
    rate *= gpu.rate(precision.dtype) / gpu.rate("bfloat16")
    if not precision.quantized:
        return rate
    weights = model.blocks * sum(layer.n * layer.m for layer in model.layers)
    moved = weights * (precision.bits / 8 + precision.bytes) * (2 + recompute)
    return tokens / (tokens / rate + moved / gpu.rates.bandwidth)


def options(model: Preset, gpu: Gpu, work: Work) -> list[Option]:
    """All precisions, each without and with checkpointing."""
    return [
        _option(model, gpu, precision, work, recompute)
        for precision in PRECISIONS
        for recompute in (False, True)
    ]


def _option(model: Preset, gpu: Gpu, precision: Precision, work: Work, recompute: bool) -> Option:
    def training(batch: int) -> StepMemory:
        tokens = batch * work.length
        return step_memory(model, precision, r=work.r, tokens=tokens, recompute=recompute)

    def fits(batch: int) -> bool:
        if training(batch).total > usable(gpu):
            return False
        return init_memory(model, gpu, precision, work, batch).total <= usable(gpu)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Option(
        precision,
        recompute,
        training(work.batch),
        init_memory(model, gpu, precision, work, work.batch),
        work.batch <= low,
        low,
        tokens_per_second(model, gpu, precision, work, recompute),
    )


def hours(work: Work, rate: float) -> float:
    """Of an epoch, at `rate` tokens per second."""
    return work.rows * work.length / rate / 3600


def plan(model: Preset, gpu: Gpu, work: Work) -> str:
    """What `lorasb plan` prints: whether it fits, speed, then memory by part."""
    found = options(model, gpu, work)
    return "\n\n".join(
        [
            _answer(model, gpu, work, found),
            _summary(work, found),
            f"batch: the most rows of {work.length} tokens that fit. Training:",
            _training_parts(found),
            f"Initialization from {work.samples} rows, the same with checkpointing (sums: of "
            "gradients;\ninputs: of blocks; batch: activations):",
            _init_parts(found),
            NOTES,
        ]
    )


def _answer(model: Preset, gpu: Gpu, work: Work, found: Sequence[Option]) -> str:
    """The two lines that matter: for the first option without fp32 that fits, else any."""
    least = min(found, key=lambda one: max(one.training.total, one.init.total))
    fitting = sorted((one for one in found if one.fits), key=lambda one: one.precision.bytes > 2)
    one = fitting[0] if fitting else least
    needed = max(one.training.total, one.init.total)
    verdict = "fits" if fitting else "does not fit"
    lines = [
        f"PREDICTION: {verdict}: {one.name}, {size(needed)} of {size(usable(gpu))}",
        f"PREDICTION: {one.tokens_per_second:.0f} tokens/s, "
        f"{_short(hours(work, one.tokens_per_second))} h an epoch of {work.rows:,} rows",
    ]
    if not fitting:
        rows = max(one.largest for one in found)
        lines[1] = f"PREDICTION: at most {rows} rows of {work.length} tokens fit; see batch below"
        if not rows:
            lines[1] = f"PREDICTION: not even 1 row of {work.length} tokens fits"
    heading = (
        f"{model.key} on {gpu.device_name}, {gpu.memory_gb:g} GB; r = {work.r} on all linear\n"
        f"layers, batches of {work.batch} x {work.length} tokens:"
    )
    return "\n".join(lines) + f"\n\n{heading}"


def _summary(work: Work, found: Sequence[Option]) -> str:
    header = ("", "fits", "train", "init", "batch", "tokens/s", "h/epoch")
    rows = [
        (
            one.name,
            "yes" if one.fits else "no",
            size(one.training.total),
            size(one.init.total),
            str(one.largest),
            f"{one.tokens_per_second:.0f}" if one.fits else "-",
            _short(hours(work, one.tokens_per_second)) if one.fits else "-",
        )
        for one in found
    ]
    return markdown_table(header, rows)


def _training_parts(found: Sequence[Option]) -> str:
    header = ("training", "weights", "adapters", "kept", "backward", "peak")
    rows = [
        (one.name, *map(size, (*vars(one.training).values(), one.training.total))) for one in found
    ]
    return markdown_table(header, rows)


def _init_parts(found: Sequence[Option]) -> str:
    header = ("init", "weights", "adapters", "sums", "inputs", "batch", "peak")
    rows = []
    for one in found:
        if not one.recompute:
            strategy, *parts = vars(one.init).values()
            name = f"{one.name} {strategy}"
            rows.append((name, *map(size, (*parts, one.init.total))))
    return markdown_table(header, rows)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


__all__ = ["InitMemory", "Option", "Work", "init_memory", "options", "plan", "tokens_per_second"]
