"""Argument checks: each error names the argument, what it was and what it should be."""

import math

import torch

MAX_RANK = 512


def check_arguments(x, weights, lora_As, lora_Rs, lora_Bs, biases, scaling, dropout_p) -> None:
    """Checks the operands of every layer on `x`; the lists are those of `lorasb_group`."""
    lists = {"lora_As": lora_As, "lora_Rs": lora_Rs, "lora_Bs": lora_Bs, "biases": biases}
    if not weights:
        raise ValueError("weights is empty; expected at least one layer")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(f"{name} has {len(values)} items; expected {len(weights)}")
    for weight, lora_A, lora_R, lora_B, bias in zip(weights, *lists.values(), strict=True):
        _check_layer(x, weight, lora_A, lora_R, lora_B, bias)
    ranks = {lora_R.shape[0] for lora_R in lora_Rs}
    if len(ranks) > 1:
        raise ValueError(f"lora_Rs have ranks {sorted(ranks)}; expected one rank")
    if len(weights) * max(ranks) > MAX_RANK:
        raise ValueError(
            f"lora_Rs has {len(weights)} layers of rank {max(ranks)}; "
            f"expected at most {MAX_RANK} ranks in all"
        )
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a float")
    if not abs(scaling) < math.inf:  # NaN too; traceable when torch.compile makes it symbolic
        raise ValueError(f"scaling is {scaling}; expected a finite number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")


def _check_layer(x, weight, lora_A, lora_R, lora_B, bias) -> None:
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_R": lora_R, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    _check_shapes(tensors)
    _check_dtypes(tensors)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
        if tensor.requires_grad and name not in ("x", "lora_R"):
            raise ValueError(
                f"{name} requires grad; expected it frozen: only x and lora_R have gradients here"
            )


def _check_shapes(tensors: dict[str, torch.Tensor]) -> None:
    x, weight, lora_R = tensors["x"], tensors["weight"], tensors["lora_R"]
    if x.dim() < 1:
        raise ValueError("x has shape (); expected [..., n]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [m, n]")
    if lora_R.dim() != 2 or lora_R.shape[0] != lora_R.shape[1]:
        raise ValueError(f"lora_R has shape {tuple(lora_R.shape)}; expected [r, r]")
    m, n = weight.shape
    r = lora_R.shape[0]
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"lora_R has rank {r}; expected 1 <= r <= {MAX_RANK}")
    if x.shape[-1] != n:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected a last dimension of {n}, "
            f"as weight is {tuple(weight.shape)}"
        )
    expected = {"lora_A": (r, n), "lora_B": (m, r), "bias": (m,)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {shape}")


def _check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    dtype = tensors["x"].dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x has dtype {dtype}; expected float16, bfloat16, float32 or float64")
    for name, tensor in tensors.items():
        if name == "lora_R":
            expected = torch.float64 if dtype == torch.float64 else torch.float32
        else:
            expected = dtype
        if tensor.dtype != expected:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}")


__all__ = ["MAX_RANK", "check_arguments"]
