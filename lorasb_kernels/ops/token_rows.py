"""The operands of a weight gradient, checked and flattened to one row per token."""

import torch

from lorasb_kernels.ops.precision import FLOAT_DTYPES


def token_rows(
    grad_output: torch.Tensor, x: torch.Tensor, row_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns grad_output [M, m], x [M, n] and row_weight [M], last dimensions contiguous.

    Args:
        grad_output: [..., m], fp16, bf16, fp32 or fp64.
        x: [..., n], same leading dimensions, dtype and device.
        row_weight: [...], the leading dimensions, fp32 (fp64 with fp64 operands), or None.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it should be.
    """
    operands = {"grad_output": grad_output, "x": x}
    if row_weight is not None:
        operands["row_weight"] = row_weight
    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; expected float16, bfloat16, float32 or float64")
    if grad_output.dtype != x.dtype:
        raise TypeError(f"grad_output has dtype {grad_output.dtype}; expected {x.dtype}, as x")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., n] with n >= 1")
    tokens = x.shape[:-1]
    if grad_output.shape[:-1] != tokens or grad_output.dim() < 1 or grad_output.shape[-1] < 1:
        raise ValueError(
            f"grad_output has shape {tuple(grad_output.shape)}; "
            f"expected {(*tokens, 'm')}, as x is {tuple(x.shape)}"
        )
    if row_weight is not None:
        if row_weight.dtype != accumulator_dtype(x):
            raise TypeError(
                f"row_weight has dtype {row_weight.dtype}; expected {accumulator_dtype(x)}"
            )
        if row_weight.shape != tokens:
            raise ValueError(
                f"row_weight has shape {tuple(row_weight.shape)}; "
                f"expected {tuple(tokens)}, one weight per row of x"
            )
        row_weight = row_weight.detach().reshape(-1).contiguous()
    return _rows(grad_output), _rows(x), row_weight


def accumulator_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 operands."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


__all__ = ["accumulator_dtype", "token_rows"]
