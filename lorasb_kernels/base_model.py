"""The base of an adapted model without a second copy of its weights: for KL terms, DPO, PPO."""

import contextlib
import copy
from collections.abc import Iterator

from torch import nn

from lorasb_kernels.io.pretrained import save_whole_again
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.targets import adapted_layers, layers_of


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the adapted layers of `model` compute `x Wᵀ + bias` alone.

    What else was trained, `modules_to_save`, stays as it is. The switch belongs to the layers:
    other threads that run the same model meet it, too, and what gradient checkpointing runs again
    in a backward pass outside the block runs with the adapters.

    Raises:
        ValueError: a plain model, or a merged layer, whose weight contains its adapter.
    """
    layers = _unmerged_layers(model).values()
    before = [layer.disabled for layer in layers]
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


def reference_model(model: nn.Module) -> nn.Module:
    """The model without its adapters, over the same tensors: what TRL takes as `ref_model`.

    A model of its own whose frozen parameters and buffers are those of `model`, so that it costs no
    memory. What trains, `modules_to_save`, is copied, and keeps the values of this moment.

    Returns:
        A plain model in evaluation mode, in which nothing requires a gradient.

    Raises:
        ValueError: a plain model, or a merged layer, whose weight contains its adapter.
    """
    _unmerged_layers(model)
    frozen = [tensor for tensor in model.parameters() if not tensor.requires_grad]
    shared = {id(tensor): tensor for tensor in [*frozen, *model.buffers()]}
    reference = copy.deepcopy(model, shared)
    for name, layer in adapted_layers(reference).items():
        if layer.shared_input is not None:
            layer.shared_input.detach()
        reference.set_submodule(name, layer.without_adapter())
    del reference.lorasb_config, reference.lorasb_skipped
    save_whole_again(reference)
    return reference.requires_grad_(False).eval()


def _unmerged_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    layers = layers_of(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{len(merged)} of {len(layers)} adapted layers are merged, such as {merged[0]}: their "
            "weights contain the adapter; expected a model after unmerge()"
        )
    return layers


__all__ = ["adapters_disabled", "reference_model"]
