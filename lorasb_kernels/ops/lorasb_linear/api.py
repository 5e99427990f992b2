"""The adapted linear layer as a function, and several of them on one input."""

from collections.abc import Sequence

import torch

from lorasb_kernels.ops.dispatch import resolve_backend
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.lorasb_linear.autograd import LoRASBFunction
from lorasb_kernels.ops.lorasb_linear.checks import check_arguments, check_backend
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer


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

    Args:
        x: [..., n], fp16, bf16 or fp32 (fp64 with the reference backend).
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
    (y,) = lorasb_group(
        x,
        (weight,),
        (lora_A,),
        (lora_R,),
        (lora_B,),
        (bias,),
        scaling,
        dropout,
        training,
        backend,
    )
    return y


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
    stacked_A: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Applies G adapted layers that read the same input (q, k, v; gate, up).

    Equals G calls of `lorasb_linear`, but reads `x` once for all adapters and adds up the input
    gradients in place. With dropout the layers share one mask. They also share the product with R,
    so if one layer's factors or `x Aᵢᵀ` are not finite, all outputs are non-finite.

    Args:
        x: [..., n].
        weights, lora_As, lora_Rs, lora_Bs, biases: the operands of each layer, as
            `lorasb_linear` takes them; one rank r with G·r ≤ 512, any numbers of outputs.
        scaling, dropout, training, backend: as in `lorasb_linear`, common to the layers.
        stacked_A: `torch.cat(lora_As)`, [G·r, n], if the caller keeps it; ignored if one of
            them is trained.

    Returns:
        One [..., mᵢ] tensor for each layer.

    Raises:
        ValueError: lists of different lengths, or different ranks.
        TypeError, ValueError, RuntimeError: as `lorasb_linear`.
    """
    device_type = x.device.type if isinstance(x, torch.Tensor) else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        weights = [w if isinstance(w, FrozenLayer) else w.to(dtype) for w in weights]
        lora_As, lora_Bs = ([_under_autocast(f, dtype) for f in fs] for fs in (lora_As, lora_Bs))
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
        stacked_A = None if stacked_A is None else _under_autocast(stacked_A, dtype)
    check_arguments(x, weights, lora_As, lora_Rs, lora_Bs, biases, scaling, dropout)
    backend = resolve_backend(backend, x.device, x.dtype)
    check_backend(backend, lora_As, dropout if training else 0.0)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    dropout = float(dropout) if training else 0.0
    seed = new_seed(x.device) if dropout > 0 else None
    if stacked_A is None or any(lora_A.requires_grad for lora_A in lora_As):
        stacked_A = lora_As[0] if len(lora_As) == 1 else torch.cat(tuple(lora_As))
    # Without a core R is the identity. Applied in registers it adds a share of r/n to the work of a
    # memory-bound kernel, and every backend's kernels run LoRA unchanged.
    identity = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    cores = [
        torch.eye(lora_A.shape[0], **identity) if lora_R is None else lora_R
        for lora_A, lora_R in zip(lora_As, lora_Rs, strict=True)
    ]
    ys = LoRASBFunction.apply(
        rows,
        stacked_A,
        float(scaling),
        dropout,
        seed,
        backend,
        *cores,
        *weights,
        *lora_Bs,
        *biases,
    )
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def _under_autocast(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor in `dtype`; an fp32 factor is returned as it is and gets an fp32 gradient."""
    return factor if factor.dtype == torch.float32 else factor.to(dtype)


__all__ = ["lorasb_group", "lorasb_linear"]
