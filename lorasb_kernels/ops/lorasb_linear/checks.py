"""Argument checks: each error names the argument, what it was and what it should be."""

import math

import torch

from lorasb_kernels.ops.limits import MAX_RANK
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer
from lorasb_kernels.ops.precision import FLOAT_DTYPES


def check_layer(x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout) -> None:
    """Checks the arguments of `lorasb_linear`."""
    frozen = isinstance(weight, FrozenLayer)
    if frozen:
        if bias is not None:
            raise ValueError("bias is given with a FrozenLayer; expected None, as it adds its own")
        weight = x.new_empty(()).expand(weight.shape)  # for the checks; no elements
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    tensors |= {} if lora_R is None else {"lora_R": lora_R}
    tensors |= {} if bias is None else {"bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    _check_shapes(tensors)
    _check_dtypes(tensors, any_factor=frozen)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
        if tensor.requires_grad and name in ("weight", "bias"):
            raise ValueError(
                f"{name} requires grad; expected it frozen: only x and the adapter's factors "
                "have gradients here"
            )
    for name, value in (("scaling", scaling), ("dropout", dropout)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a float")
    if not abs(scaling) < math.inf:  # NaN too; traceable when torch.compile makes it symbolic
        raise ValueError(f"scaling is {scaling}; expected a finite number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")


def check_lists(x, weights, lora_As, lora_Rs, lora_Bs, biases) -> None:
    """Checks what the lists of `lorasb_group` have in common; not yet the layers."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
    if x.dim() < 1:
        raise ValueError("x has shape (); expected [..., n]")
    lists = {"lora_As": lora_As, "lora_Rs": lora_Rs, "lora_Bs": lora_Bs, "biases": biases}
    if not weights:
        raise ValueError("weights is empty; expected at least one layer")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(f"{name} has {len(values)} items; expected {len(weights)}")
    ranks = {lora_A.shape[0] for lora_A in lora_As}
    if len(ranks) > 1:
        raise ValueError(f"lora_As have ranks {sorted(ranks)}; expected one rank")


def _check_shapes(tensors: dict[str, torch.Tensor]) -> None:
    x, weight, lora_A = tensors["x"], tensors["weight"], tensors["lora_A"]
    lora_R = tensors.get("lora_R")
    if x.dim() < 1:
        raise ValueError("x has shape (); expected [..., n]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [m, n]")
    if lora_R is not None and (lora_R.dim() != 2 or lora_R.shape[0] != lora_R.shape[1]):
        raise ValueError(f"lora_R has shape {tuple(lora_R.shape)}; expected [r, r]")
    if lora_A.dim() != 2:
        raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}; expected [r, n]")
    m, n = weight.shape
    name, r = ("lora_A", lora_A.shape[0]) if lora_R is None else ("lora_R", lora_R.shape[0])
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{name} has rank {r}; expected 1 <= r <= {MAX_RANK}")
    if x.shape[-1] != n:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected a last dimension of {n}, "
            f"as weight is {tuple(weight.shape)}"
        )
    expected = {"lora_A": (r, n), "lora_B": (m, r), "bias": (m,)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {shape}")


def _check_dtypes(tensors: dict[str, torch.Tensor], any_factor: bool) -> None:
    """`any_factor`: A and B may have any dtype, because a frozen layer accepts several for x."""
    dtype = tensors["x"].dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {dtype}; expected float16, bfloat16, float32 or float64")
    master = torch.promote_types(dtype, torch.float32)
    accepted = {"lora_R": (master,), "lora_A": (dtype, master), "lora_B": (dtype, master)}
    if any_factor:
        accepted |= dict.fromkeys(("lora_A", "lora_B"), FLOAT_DTYPES)
    for name, tensor in tensors.items():
        expected = dict.fromkeys(accepted.get(name, (dtype,)))
        if tensor.dtype not in expected:
            names = " or ".join(map(str, expected))
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {names}")


def check_backend(backend: str, lora_A, dropout: float) -> None:
    """Raises RuntimeError if `backend` cannot compute the gradient of a trained factor."""
    if backend == "cuda" and dropout > 0 and lora_A.requires_grad:
        raise RuntimeError(
            "backend='cuda' cannot run: its kernel for the gradient of lora_A has no dropout; "
            "expected lora_A frozen, dropout = 0 or another backend"
        )


__all__ = ["check_backend", "check_layer", "check_lists"]
