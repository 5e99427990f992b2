"""Update estimation: the sign of the gradient, summed over a few samples, layer by layer.

    ΔW = −η · sign( Σ_i ∂ℓ_i/∂W )            (LoRA-SB, arXiv:2411.19557, section 4)

Three strategies give the same sums with different memory and work: see `resident`,
`layerwise` and `grouped`.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lorasb_kernels.init.estimation import ranks
from lorasb_kernels.init.estimation.blocks import find_blocks
from lorasb_kernels.init.estimation.frozen_eval import estimation_mode, random_state_kept
from lorasb_kernels.init.estimation.grouped import grouped
from lorasb_kernels.init.estimation.layerwise import layerwise
from lorasb_kernels.init.estimation.losses import default_loss
from lorasb_kernels.init.estimation.memory import accumulator_bytes, free_memory
from lorasb_kernels.init.estimation.options import EstimationOptions
from lorasb_kernels.init.estimation.resident import resident
from lorasb_kernels.init.estimation.sums import Estimation
from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.linear_layers import is_linear

DEFAULTS = EstimationOptions()


def estimate_updates(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Iterable[str],
    options: EstimationOptions = DEFAULTS,
    *,
    progress: bool = False,
) -> Iterator[tuple[str, SignMatrix]]:
    """Yields each target layer's name and the sign of its summed gradient, one at a time.

    The order is the strategy's. Arguments and errors are those of `estimate_gradients`;
    an update descends, so it is minus this sign.
    """
    gradients = estimate_gradients(model, batches, targets, options, progress=progress)
    return ((name, SignMatrix.from_dense(gradient)) for name, gradient in gradients)


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Iterable[str],
    options: EstimationOptions = DEFAULTS,
    *,
    progress: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each target layer's name and Σ_i ∂ℓ_i/∂W [m, n], fp32, one at a time.

    ℓ_i is the loss of sample i, and every sample has the same weight, however the samples are
    split into micro-batches or, with `torch.distributed`, distributed over the ranks.
    Dropout is off. Only the gradients of the targets are computed. With float16 layers the loss
    is scaled so that small gradients do not underflow, and the sums are scaled back. Only
    a layer's own call `x ↦ x Wᵀ` counts: a loss that reads W itself (weight decay, tied
    embeddings) adds nothing. Whenever the caller has control, the model is unchanged:
    modes, `requires_grad`, `.grad`, buffers, configuration, and the random number generators.

    Args:
        model: the model; if it is a `DistributedDataParallel`, the module inside is used.
        batches: micro-batches; all are held in a list.
        targets: names of linear layers in `model.named_modules()`.
        options: loss, strategy and memory budget.
        progress: show a progress bar, if tqdm is installed.

    Raises:
        TypeError: an argument or target of the wrong type; FSDP-sharded parameters; a
            model whose loss is not known when `options.loss_fn` is None.
        ValueError: no batches, no or unknown targets, a budget below the largest layer's
            accumulator, no labels, a loss that is None or does not require grad; gradients
            that are zero in every layer (raised last).
        FloatingPointError: a loss or gradient that is not finite; names batch and layer.
        RuntimeError: estimation failed on another rank.
    """
    estimation = prepared(model, batches, targets, options, progress)
    budget = _budget(estimation)
    strategy = options.strategy
    if strategy == "auto":
        strategy = _choose(estimation, budget)
    return _run(estimation, strategy, budget)


def prepared(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Iterable[str],
    options: EstimationOptions,
    progress: bool = False,
) -> Estimation:
    """Checks the arguments of `estimate_gradients` and chooses the loss."""
    if not isinstance(options, EstimationOptions):
        raise TypeError(f"options is a {type(options).__name__}; expected EstimationOptions")
    model = _unwrapped(model)
    layers = _target_layers(model, targets)
    device = next(iter(layers.values())).weight.device
    batches = listed(batches, device)
    if options.loss_fn is None:
        with ranks.in_step(device), estimation_mode(model):
            loss_fn, batches = default_loss(model, batches)
        options = dataclasses.replace(options, loss_fn=loss_fn)
    return Estimation(model, layers, batches, options, progress)


def _run(
    estimation: Estimation, strategy: str, budget: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    remaining = list(estimation.layers)
    while remaining:
        if strategy == "resident":
            results = resident(estimation, remaining)
        elif strategy == "layerwise":
            results = layerwise(estimation, remaining, budget)
        else:
            results = grouped(estimation, remaining, budget)
        done = set()
        reason = None
        try:
            for name, gradient in results:
                done.add(name)
                yield name, gradient
        except ranks.FallBack as fall_back:
            reason = str(fall_back)
        remaining = [name for name in remaining if name not in done]
        if reason is not None:
            strategy = _next_strategy(strategy, reason)
    estimation.conclude()


def _next_strategy(strategy: str, reason: str) -> str:
    if strategy == "grouped":
        raise MemoryError(
            f"strategy 'grouped' gave up: {reason}; a smaller memory_budget makes smaller groups"
        )
    following = "layerwise" if strategy == "resident" else "grouped"
    warnings.warn(f"strategy {strategy!r} gave up: {reason}; using {following!r}", stacklevel=3)
    return following


def _choose(estimation: Estimation, budget: int | None) -> str:
    needed = sum(map(accumulator_bytes, estimation.layers.values()))
    if budget is None or needed <= budget:
        return "resident"
    return "layerwise" if find_blocks(estimation.model, estimation.layers) else "grouped"


def _budget(estimation: Estimation) -> int | None:
    """The caller's budget, else half the least free memory of any rank; None if unknown."""
    largest = max(map(accumulator_bytes, estimation.layers.values()))
    budget = estimation.options.memory_budget
    if budget is None:
        free = free_memory(estimation.device)
        return None if free is None else int(ranks.minimum(free // 2, estimation.device))
    if budget < largest:
        raise ValueError(
            f"memory_budget is {budget}; expected at least {largest} bytes, "
            "the accumulator of the largest target layer"
        )
    return budget


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    sharded = [
        name
        for name, parameter in model.named_parameters()
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__)
    ]
    if sharded or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise TypeError(
            "model is sharded by FSDP, so no rank holds whole layers; expected it whole: "
            "initialize the adapters before sharding"
        )
    return model


def _target_layers(model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
    if isinstance(targets, str):
        raise TypeError(f"targets is the string {targets!r}; expected a list of layer names")
    modules = dict(model.named_modules())
    layers = {}
    for name in targets:
        if name not in modules:
            raise ValueError(f"targets names {name!r}; expected a name in model.named_modules()")
        if not is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise TypeError(f"target {name!r} is a {kind}; expected an nn.Linear")
        if modules[name].weight.is_meta:
            raise ValueError(f"target {name!r} is on the meta device; expected real weights")
        layers[name] = modules[name]
    if not layers:
        raise ValueError("targets is empty; expected at least one layer name")
    return layers


def listed(batches: Iterable[Any] | None, device: torch.device) -> list[Any]:
    """The batches as a list, at least one; on every rank, or an error on every rank.

    Args:
        batches: an iterable of batches.
        device: of the tensors that the ranks exchange.

    Raises:
        ValueError, TypeError: no batches, or a dict.
    """
    with ranks.in_step(device), random_state_kept():
        return _listed(batches)


def _listed(batches: Iterable[Any] | None) -> list[Any]:
    if batches is None:
        raise ValueError("batches is None; expected the samples to estimate the update from")
    if isinstance(batches, dict):
        raise TypeError("batches is a dict; expected an iterable of batches")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; expected at least one batch")
    return batches


__all__ = ["estimate_gradients", "estimate_updates", "listed", "prepared"]
