"""The adapted linear layer as a function, and several of them on one input."""

from collections.abc import Sequence

import torch

from lorasb_kernels.ops.dispatch import is_observed, resolve_backend
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.lorasb_linear.autograd import LoRASBFunction, apply_directly, forward
from lorasb_kernels.ops.lorasb_linear.checked import checked_before, remember
from lorasb_kernels.ops.lorasb_linear.checks import check_backend, check_layer, check_lists
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer
from lorasb_kernels.ops.lorasb_linear.jagged import as_jagged, jagged_rows
from lorasb_kernels.ops.lorasb_linear.operands import cast_input, cast_layer
from lorasb_kernels.ops.lorasb_linear.operations import operations
from lorasb_kernels.ops.lorasb_linear.siblings import CommonInput


def lorasb_linear(
    x: torch.Tensor,
    weight: torch.Tensor | FrozenLayer,
    lora_A: torch.Tensor,
    lora_R: torch.Tensor | None,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Applies a frozen linear layer with an adapter: LoRA-SB, LoRA-XS, LoRA and LoRA variants.

    Computes `x Wᵀ + s · drop(x) Aᵀ Rᵀ Bᵀ + bias`. Differentiable once, with respect to `x`
    and those of `lora_A`, `lora_R` and `lora_B` that require grad; W and bias are frozen. LoRA-SB
    (arXiv:2411.19557) trains only R: then `drop(x) Aᵀ` (M·r elements) is kept for backward and `x`
    is not. LoRA (arXiv:2106.09685) has no R and trains A and B: `x` is kept if A is trained, and
    M·r elements if B is. Gradients of the factors are accumulated in fp32 and
    returned in the factor's dtype. Under autocast the operands are cast to its dtype, except
    for factors in fp32.

    A row of x that is not finite, or whose `x Aᵀ` is beyond the range of fp16, gives a row of y
    that is not finite, also with R = 0 where the frozen layer alone may be finite: 0·∞ is NaN.

    Args:
        x: [..., n], fp16, bf16 or fp32 (fp64 with the reference backend); may be nested, jagged.
        weight: [m, n], frozen, dtype of `x`; or a `FrozenLayer`, which computes its own product,
            adds its own bias and takes A and B of any dtype.
        lora_A: [r, n], dtype of `x`, or fp32 (a trained master), then used in the dtype of `x`.
        lora_R: [r, r], fp32 (fp64 with fp64 operands); None for the identity.
        lora_B: [m, r], as `lora_A`.
        bias: [m], frozen, or None.
        scaling: s, finite.
        dropout: probability, in [0, 1), that an element of the adapter's input is
            zeroed; the rest are divided by 1 − p.
        training: dropout applies only when True.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Returns:
        [..., m], dtype of `x`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a rank outside 1 … 512, tensors on different
            devices, a weight or bias that requires grad, a non-finite scaling, dropout
            outside [0, 1), an unknown backend.
        RuntimeError: a named backend that cannot run here; `"cuda"` with dropout before a
            trained `lora_A`.
    """
    direct = not is_observed()
    operands = (x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout)
    known = checked_before(backend, *operands) if direct else None
    if known is not None:
        backend = known
    elif isinstance(x, torch.Tensor) and x.is_nested:
        adapter = (lora_A, lora_R, lora_B, bias, scaling, dropout, training, backend)
        return as_jagged(lorasb_linear(jagged_rows(x), weight, *adapter), x)
    else:
        if isinstance(x, torch.Tensor):
            weight, lora_A, lora_B, bias = cast_layer(x, weight, lora_A, lora_B, bias)
            x = cast_input(x)
        check_layer(x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout)
        chosen = resolve_backend(backend, x.device, x.dtype)
        direct = direct and remember(chosen, backend, *operands)
        backend = chosen
    if not training:
        dropout = 0.0
    if dropout > 0:
        check_backend(backend, lora_A, dropout)
        seed = new_seed(x.device)
    else:
        seed = None
    arguments = (x, lora_A, lora_R, lora_B, weight, bias, float(scaling), float(dropout), seed)
    if not direct:
        return LoRASBFunction.apply(*arguments, backend, False)
    if torch.is_grad_enabled():
        return apply_directly(*arguments, backend, True)
    return forward(*arguments, operations(backend, True))[0]


def lorasb_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | FrozenLayer],
    lora_As: Sequence[torch.Tensor],
    lora_Rs: Sequence[torch.Tensor | None],
    lora_Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Applies G adapted layers that read the same input (q, k, v; gate, up).

    Equals G calls of `lorasb_linear`, but projects `x` in one pass for all adapters and adds up
    the input gradients in place. With dropout, where each layer has a mask of its own, for a nested
    `x` and under `torch.compile` it makes these calls. Backward may run through the outputs one by
    one.

    Args:
        x: [..., n].
        weights, lora_As, lora_Rs, lora_Bs, biases: the operands of each layer, as
            `lorasb_linear` takes them; one rank r, any numbers of outputs.
        scaling, dropout, training, backend: as in `lorasb_linear`, common to the layers.

    Returns:
        One [..., mᵢ] tensor for each layer.

    Raises:
        ValueError: lists of different lengths, or different ranks.
        TypeError, ValueError, RuntimeError: as `lorasb_linear`.
    """
    check_lists(x, weights, lora_As, lora_Rs, lora_Bs, biases)
    layers = list(zip(weights, lora_As, lora_Rs, lora_Bs, biases, strict=True))
    alone = (training and dropout > 0) or x.is_nested or torch.compiler.is_compiling()
    if len(layers) == 1 or alone:
        settings = (scaling, dropout, training, backend)
        return tuple(lorasb_linear(x, *layer, *settings) for layer in layers)
    sizes = [weight.shape[0] for weight in weights]
    common = CommonInput(x, lora_As, lora_Rs, sizes, scaling, backend)
    operands = [common.operands(*layer) for layer in layers]
    return tuple(common.output(index, x, *layer) for index, layer in enumerate(operands))


__all__ = ["lorasb_group", "lorasb_linear"]
