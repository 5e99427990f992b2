"""Why a linear layer cannot be adapted."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorasb_kernels.linear_layers import is_conv1d, matrix_shape
from lorasb_kernels.ops.precision import FLOAT_DTYPES
from lorasb_kernels.quantization import check_quantized, quantization_of


class Obstacle(NamedTuple):
    """Why one layer cannot be adapted: in few words, and as the error that says it in full."""

    reason: str
    error: Exception


def obstacles(model: nn.Module, layers: Mapping[str, nn.Module], r: int) -> dict[str, Obstacle]:
    """What keeps each of `layers` from taking a rank-r adapter; layers without an obstacle are
    not listed.

    Args:
        model: the model, on any device, meta included.
        layers: linear layers of it by name.
        r: rank.

    Raises:
        TypeError: a quantized layer that is in a state or format that cannot be adapted, or a
            sharded weight, which is not of this layer alone.
    """
    users = Counter(
        _storage(tensor)
        for _, module in model.named_modules(remove_duplicate=False)
        for tensor in module._parameters.values()
        if tensor is not None
    )
    found = {}
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        for obstacle in _obstacles(name, layer, parent, users, r):
            found[name] = obstacle
            break
    return found


def _obstacles(
    name: str, layer: Any, parent: nn.Module, users: Counter[int], r: int
) -> Iterator[Obstacle]:
    error: Exception
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if quantization_of(layer) is not None:
        check_quantized(name, layer)
    elif hasattr(layer, "parametrizations"):
        yield Obstacle(
            "its weight is parametrized",
            TypeError(f"{name} is parametrized; expected a plain weight"),
        )
    elif isinstance(layer, NonDynamicallyQuantizableLinear):
        yield _weight_is_read(name, f"{kind}, whose weight nn.MultiheadAttention")
    elif isinstance(parent, nn.TransformerEncoderLayer):
        yield _weight_is_read(name, f"{kind}, whose weight nn.TransformerEncoderLayer in eval mode")
    elif not computes_linear(layer):
        error = TypeError(
            f"{name} is a {kind}, whose forward is not that of nn.Linear; expected a plain "
            "nn.Linear, or a layer that computes the same"
        )
        yield Obstacle("its forward is not that of nn.Linear", error)
    else:
        weight = layer.weight
        if weight.dtype not in FLOAT_DTYPES or type(weight.data) is not torch.Tensor:
            stored = f"{type(weight.data).__name__} of {weight.dtype}"
            error = TypeError(
                f"{name}.weight is a {stored}; expected a float16, bfloat16 or float32 tensor, or "
                "one that bitsandbytes or torchao quantized"
            )
            if stored.startswith("DTensor"):
                raise error  # the model is sharded, and no layer of it is one to leave out
            yield Obstacle(f"its weight is a {stored}", error)
    if users[_storage(layer.weight)] > 1:
        error = ValueError(
            f"{name}.weight is shared with another module (tied weights); adapting it would "
            "change both. Leave it out of target_modules"
        )
        yield Obstacle("its weight is shared with another module", error)
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        error = ValueError(f"{name} has hooks, which would be lost; expected them added later")
        yield Obstacle("it has hooks, which would be lost", error)
    limit = min(matrix_shape(layer))
    if r > limit:
        error = ValueError(f"r is {r}; expected r <= {limit} for {name}, which is {layer}")
        yield Obstacle(f"it has fewer than r = {r} inputs or outputs", error)


def _weight_is_read(name: str, whom: str) -> Obstacle:
    error = TypeError(
        f"{name} is a {whom} reads past the layer, so that an adapter would have no effect; "
        "expected a plain nn.Linear that is called"
    )
    return Obstacle("its weight is read past the layer", error)


def _storage(tensor: torch.Tensor) -> int:
    """Identifies the memory of a tensor; torchao's and meta tensors have no address."""
    return tensor.data_ptr() or id(tensor)


def computes_linear(layer: nn.Module) -> bool:
    """Whether the forward of a linear layer is `x Wᵀ + bias`.

    A subclass may compute anything. It is tried on a copy of the layer that has a small random
    weight instead of its own, in eval and training mode, in fp32 and bf16.
    """
    if type(layer) is nn.Linear:
        return True
    tensors = {**layer._parameters, **layer._buffers, **layer._modules}
    if tensors.keys() - {"weight", "bias"}:
        return False
    return all(
        _is_linear_in(layer, dtype, training)
        for dtype in (torch.float32, torch.bfloat16)
        for training in (False, True)
    )


@torch.no_grad()
def _is_linear_in(layer: nn.Module, dtype: torch.dtype, training: bool) -> bool:
    m, n = 6, 5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    weight, x = draw(m, n), draw(2, 3, n)
    bias = None if layer.bias is None else nn.Parameter(draw(m))
    small = copy.copy(layer)
    stored = weight.T.contiguous() if is_conv1d(layer) else weight
    names = ("nx", "nf") if is_conv1d(layer) else ("in_features", "out_features")
    small.__dict__.update(zip(names, (n, m), strict=True))
    small.training = training
    small._parameters = {"weight": nn.Parameter(stored), "bias": bias}
    try:
        with torch.random.fork_rng(devices=[]):
            y = small.forward(x)
    except Exception:  # whatever another forward makes of this input
        return False
    expected = F.linear(x, weight, bias)
    same_kind = isinstance(y, torch.Tensor) and (y.dtype, y.shape) == (dtype, expected.shape)
    tolerance = 4 * torch.finfo(dtype).eps
    return same_kind and torch.allclose(y, expected, rtol=tolerance, atol=n * tolerance)


__all__ = ["Obstacle", "computes_linear", "obstacles"]
