"""What an initialization is timed against: plain passes, and the published procedure.

Every contender takes a model, micro-batches, target names, rank and η, and returns the
adapters `{name: (U, S, V)}` it found, empty for plain passes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lorasb_kernels.init import EstimationOptions, estimate_updates, truncated_svd
from lorasb_kernels.init.estimation.losses import per_sample_loss

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def plain(model: nn.Module, batches: list[dict], targets: list[str], r: int, eta: float) -> Factors:
    """Forward and backward of full fine-tuning, gradients accumulating in `.grad`."""
    model.eval().requires_grad_(True)
    for batch in batches:
        per_sample_loss(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    return {}


def plain_own_loss(
    model: nn.Module, batches: list[dict], targets: list[str], r: int, eta: float
) -> Factors:
    """As `plain`, by the model's own loss, which computes the logits of every token."""
    model.eval().requires_grad_(True)
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return {}


def plain_targets(
    model: nn.Module, batches: list[dict], targets: list[str], r: int, eta: float
) -> Factors:
    """As `plain`, with only the targets' gradients computed."""
    model.eval().requires_grad_(False)
    for name in targets:
        model.get_submodule(name).weight.requires_grad_(True)
    for batch in batches:
        per_sample_loss(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    return {}


def published(
    model: nn.Module, batches: list[dict], targets: list[str], r: int, eta: float
) -> Factors:
    """The published LoRA-SB initialization.

    A hook on every parameter runs at each gradient: it goes through all parameters, moves the
    gradients it finds to the host in bf16, frees them and sums them there. Then
    `torch.svd_lowrank(q=r, niter=10)` of −η·sign in fp32.
    """
    model.train().requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}

    def move_gradients(parameter):
        for name, other in model.named_parameters():
            if other.grad is None:
                continue
            gradient = other.grad.to("cpu", torch.bfloat16)
            sums[name] = sums[name] + gradient if name in sums else gradient
            other.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(move_gradients)
        for parameter in model.parameters()
    ]
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    factors = {}
    for name in targets:
        update = -eta * torch.sign(sums[f"{name}.weight"].float())
        factors[name] = torch.svd_lowrank(update, q=r, niter=10)
    return factors


def ours(
    model: nn.Module,
    batches: list[dict],
    targets: list[str],
    r: int,
    eta: float,
    *,
    strategy: str,
    svd: bool = True,
) -> Factors:
    """`estimate_updates` with `strategy`, and the truncated SVD of each update as it comes."""
    factors = {}
    for name, signs in estimate_updates(
        model, batches, targets, EstimationOptions(strategy=strategy)
    ):
        if svd:
            result = truncated_svd(signs, r)
            factors[name] = (-result.U, eta * result.S, result.V)
    return factors


CONTENDERS: dict[str, Callable[..., Factors]] = {
    "plain": plain,
    "plain, own loss": plain_own_loss,
    "plain, targets only": plain_targets,
    "published": published,
    "resident": partial(ours, strategy="resident"),
    "resident, no SVD": partial(ours, strategy="resident", svd=False),
    "layerwise": partial(ours, strategy="layerwise"),
    "layerwise, no SVD": partial(ours, strategy="layerwise", svd=False),
}


__all__ = ["CONTENDERS", "Factors"]
