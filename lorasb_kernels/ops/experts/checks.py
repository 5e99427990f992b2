"""Argument checks of `experts_linear`: each error names the argument and what it should be."""

import math

import torch

from lorasb_kernels.ops.limits import MAX_RANK
from lorasb_kernels.ops.precision import FLOAT_DTYPES


def check_experts(
    x, weight, A, R, B, offsets, scaling, bias, dropout_p, seed, is_transposed
) -> None:
    """Checks the arguments; the values of `offsets` only where they are on the CPU."""
    tensors = {"x": x, "weight": weight, "A": A, "R": R, "B": B, "offsets": offsets}
    tensors |= {} if bias is None else {"bias": bias}
    tensors |= {} if seed is None else {"seed": seed}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    _check_shapes(tensors, is_transposed)
    _check_dtypes(tensors)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
        if tensor.requires_grad and name not in ("x", "R"):
            raise ValueError(f"{name} requires grad; expected it frozen: only x and R are trained")
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a float")
    if not abs(scaling) < math.inf:  # NaN too
        raise ValueError(f"scaling is {scaling}; expected a finite number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_offsets(offsets, x.shape[0])


def _check_shapes(tensors: dict[str, torch.Tensor], is_transposed: bool) -> None:
    layout = "[E, n, m]" if is_transposed else "[E, m, n]"
    dimensions = {"x": (2, "[M, n]"), "weight": (3, layout), "R": (3, "[E, r, r]")}
    for name, (number, expected) in dimensions.items():
        if tensors[name].dim() != number:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {expected}")
    E, m, n = tensors["weight"].shape
    if is_transposed:
        m, n = n, m
    r = tensors["R"].shape[-1]
    if E == 0:
        raise ValueError(f"weight has shape {tuple(tensors['weight'].shape)}; expected E >= 1")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"R has rank {r}; expected 1 <= r <= {MAX_RANK}")
    if tensors["x"].shape[1] != n:
        raise ValueError(
            f"x has shape {tuple(tensors['x'].shape)}; expected [M, {n}], as weight {layout} is "
            f"{tuple(tensors['weight'].shape)}"
        )
    shapes = {
        "R": ((E, r, r),),
        "A": ((E, r, n), (1, r, n)),
        "B": ((E, m, r), (1, m, r)),
        "bias": ((E, m),),
        "offsets": ((E,),),
        "seed": ((1,),),
    }
    for name, expected in shapes.items():
        if name in tensors and tuple(tensors[name].shape) not in expected:
            names = " or ".join(map(str, dict.fromkeys(expected)))
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {names}")


def _check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    dtype = tensors["x"].dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {dtype}; expected float16, bfloat16, float32 or float64")
    master = torch.promote_types(dtype, torch.float32)
    accepted = {
        "R": (master,),
        "A": (dtype, master),
        "B": (dtype, master),
        "offsets": (torch.int32,),
        "seed": (torch.int64,),
    }
    for name, tensor in tensors.items():
        expected = dict.fromkeys(accepted.get(name, (dtype,)))
        if tensor.dtype not in expected:
            names = " or ".join(map(str, expected))
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {names}")


def _check_offsets(offsets: torch.Tensor, M: int) -> None:
    ends = offsets.tolist()
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] > M:
        raise ValueError(f"offsets are {ends}; expected 0 <= offsets[0] <= … <= offsets[-1] <= {M}")


__all__ = ["check_experts"]
