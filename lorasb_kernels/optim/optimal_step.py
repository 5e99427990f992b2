"""Theorem 3's correction on the optimizer's step of R instead of on its gradient.

    R ← R + (1/s²)·(BᵀB)⁻¹ ΔR (AAᵀ)⁻¹        ΔR: the step that the optimizer took

(arXiv:2411.19557). For gradient descent both are the same. Adam divides by the size of past
gradients, so a rescaled gradient gives the same step, but a rescaled step does not.
"""

import torch
from torch import nn

from lorasb_kernels.nn.linear import LoRASBLinear, inverse_grams
from lorasb_kernels.targets import layers_of


def correct_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> list:
    """Makes every `optimizer.step()` correct its steps of the cores of `model`.

    Args:
        optimizer: any optimizer of torch that holds the cores.
        model: an adapted model without `optimal_gradient`. A, B and s must not change.

    Returns:
        handles of the two hooks; `remove()` on each removes the correction.

    Raises:
        ValueError: the model has no core, or corrects its gradients already.
    """
    layers = [layer for layer in layers_of(model).values() if isinstance(layer, LoRASBLinear)]
    if not layers:
        raise ValueError("the model trains no core; expected an init that does")
    if any(layer.optimal_gradient for layer in layers):
        raise ValueError("optimal_gradient is True; expected False, or the correction counts twice")
    factors = [inverse_grams(layer.lora_A, layer.lora_B) for layer in layers]
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(*_) -> None:
        before[:] = [layer.lora_R.clone() for layer in layers]

    @torch.no_grad()
    def correct(*_) -> None:
        for layer, start, inverses in zip(layers, before, factors, strict=True):
            step = (layer.lora_R - start) / layer.scaling**2
            if inverses is not None:
                left, right = inverses
                step = left @ step @ right
            layer.lora_R.copy_(start + step)
        before.clear()

    return [
        optimizer.register_step_pre_hook(remember),
        optimizer.register_step_post_hook(correct),
    ]


__all__ = ["correct_steps"]
