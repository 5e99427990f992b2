"""The variants of the sign kernels that `resources` compiles: cases, tiles and arguments."""

from collections.abc import Iterator

import torch
import triton.language as tl

from lorasb_kernels.ops.triton.pack_signs import pack_signs_kernel
from lorasb_kernels.ops.triton.parts import GROUP_M
from lorasb_kernels.ops.triton.sign_matmul import sign_matmul_kernel
from lorasb_kernels.ops.triton.sign_tiles import pack_tile, sign_matmul_tile, weight_gradient_tile
from lorasb_kernels.ops.triton.tiles import Tile
from lorasb_kernels.ops.triton.weight_gradient import weight_gradient_kernel

Case = tuple[str, Tile, dict[str, object], dict[str, object]]

_PLANES = {"positive_ptr": "*i32", "negative_ptr": "*i32"}
_MATRIX = {"m": 4096, "n": 4096}


def _accumulations(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    outputs = {"acc_ptr": "*fp32", "stride_acc": 4096, "positive_ptr": None, "negative_ptr": None}
    return _weight_gradients(arch, dtype, outputs, signs=False)


def _one_shot_signs(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    return _weight_gradients(arch, dtype, {"acc_ptr": None, "stride_acc": 0, **_PLANES}, signs=True)


def _weight_gradients(
    arch: str, dtype: torch.dtype, outputs: dict[str, object], signs: bool
) -> Iterator[Case]:
    for weighted in (False, True):
        arguments = {
            **outputs,
            "dy_ptr": "*",
            "x_ptr": "*",
            "weight_ptr": "*fp32" if weighted else None,
            "tokens": 8191,
            **_MATRIX,
            "stride_dy": 4096,
            "stride_x": 4096,
        }
        product_dtype = torch.float32 if weighted else dtype
        constants = {
            "SIGNS": signs,
            "WEIGHTED": weighted,
            "GROUP_M": GROUP_M,
            "PRECISION": "tf32x3" if product_dtype == torch.float32 else "tf32",
        }
        case = "row weights" if weighted else "plain"
        yield case, weight_gradient_tile(arch, product_dtype), arguments, constants


def _packings(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    if dtype == torch.float32:
        arguments = {**_PLANES, "acc_ptr": "*fp32", **_MATRIX, "stride_acc": 4096}
        yield "accumulator", pack_tile(arch), arguments, {}


def _sign_products(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.float32:
        return
    for transpose in (False, True):
        for q in (16, 64, 96, 160):
            # Few and many rows per multiprocessor: tiles of 32 and of 64 rows, if they differ.
            for tile in dict.fromkeys(sign_matmul_tile(arch, 4096, q, sms) for sms in (1, 4096)):
                arguments = {
                    **_PLANES,
                    "dense_ptr": "*fp32",
                    "out_ptr": "*fp32",
                    **_MATRIX,
                    "q": q,
                    "stride_dk": q,
                    "stride_dq": 1,
                }
                constants = {"TRANSPOSE": transpose, "TERM": tl.bfloat16, "TERMS": 3}
                yield f"q={q}" + (", transposed" if transpose else ""), tile, arguments, constants


SIGN_KERNELS = {
    "sign_accumulate": (weight_gradient_kernel, _accumulations),
    "sign_gradient": (weight_gradient_kernel, _one_shot_signs),
    "pack_signs": (pack_signs_kernel, _packings),
    "sign_matmul": (sign_matmul_kernel, _sign_products),
}

__all__ = ["SIGN_KERNELS"]
