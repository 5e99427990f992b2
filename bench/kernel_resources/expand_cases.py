"""The variants of the expand kernels that `resources` compiles: cases, tiles and arguments."""

from collections.abc import Iterator

import torch

from lorasb_kernels.ops.triton.expand import UNITS, expand_kernel
from lorasb_kernels.ops.triton.expand_descriptor import expand_descriptor_kernel
from lorasb_kernels.ops.triton.parts import GROUP_M, in_units
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_BLOCK_R,
    Tile,
    descriptor_candidates,
    expand_tile,
)

Case = tuple[str, Tile, dict[str, object], dict[str, object]]

_SHAPE = {"M": 8191, "N": 4096, "K": 4096, "r": 96}
_ODD_SHAPE = {"M": 8191, "N": 4104, "K": 4104, "r": 24}
_NUMBERS = ("N", "K", "r", "stride_xm", "stride_wn", "stride_wk", "stride_fn", "stride_fr")
_DROPOUT = {"keep_scale": 1.5, "threshold": 2**31 + 1}


def _expands(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    for case, frozen_product, transposed, dropout, shape in (
        ("forward", True, False, False, _SHAPE),
        ("forward, odd multiples of 8", True, False, False, _ODD_SHAPE),
        ("dx", True, True, False, _SHAPE),
        ("dx, odd multiples of 8", True, True, False, _ODD_SHAPE),
        ("dx, dropout", True, True, True, _SHAPE),
        ("second call, dropout", False, True, True, _SHAPE),
    ):
        M, N, K, r = shape.values()
        strides = [K, *([1, N, 1, N] if transposed else [K, 1, r, 1])]
        numbers, units = zip(*map(in_units, (N, K, r, *strides)), strict=True)
        arguments = {
            **dict.fromkeys(("x_ptr", "weight_ptr"), "*" if frozen_product else None),
            **dict.fromkeys(("p_ptr", "factor_ptr", "y_ptr"), "*"),
            "bias_ptr": None if transposed else "*",
            "seed_ptr": "*i64" if dropout else None,
            "M": M,
            **dict(zip(_NUMBERS, numbers, strict=True)),
            "stride_xk": 1,
            **_DROPOUT,
        }
        constants = {
            **dict(zip(UNITS, units, strict=True)),
            "FROZEN_PRODUCT": frozen_product,
            "BIAS": not transposed,
            "DROPOUT": dropout,
            "BLOCK_R": EXPAND_BLOCK_R,
            "GROUP_M": GROUP_M,
        }
        yield case, expand_tile(arch, dtype, dropout), arguments, constants


def _descriptor_expands(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    for case, transposed, dropout in (
        ("forward", False, False),
        ("dx", True, False),
        ("dx, dropout", True, True),
    ):
        for tile in descriptor_candidates(arch, dtype, dropout):
            rows, columns, k = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
            arguments = {
                **{
                    "x_desc": (rows, k),
                    "p_desc": (rows, k),
                    "y_desc": (rows, columns // 2),
                },
                "weight_desc": (k, columns) if transposed else (columns, k),
                "factor_desc": (k, columns) if transposed else (columns, k),
                "bias_ptr": None if transposed else "*",
                "seed_ptr": "*i64" if dropout else None,
                **_SHAPE,
                **_DROPOUT,
                "programs": 132,
            }
            constants = {
                "TRANSPOSED": transposed,
                "BIAS": not transposed,
                "DROPOUT": dropout,
                "GROUP_M": GROUP_M,
            }
            yield case, tile, arguments, constants


EXPAND_KERNELS = {
    "expand": (expand_kernel, _expands),
    "expand_descriptor": (expand_descriptor_kernel, _descriptor_expands),
}

__all__ = ["EXPAND_KERNELS"]
