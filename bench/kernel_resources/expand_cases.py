"""The variants of the expand kernels that `resources` compiles: cases, tiles and arguments."""

from collections.abc import Iterator

import torch

from lorasb_kernels.ops.triton.expand import expand_kernel
from lorasb_kernels.ops.triton.expand_descriptor import expand_descriptor_kernel
from lorasb_kernels.ops.triton.parts import GROUP_M
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_BLOCK_R,
    Tile,
    descriptor_candidates,
    expand_tile,
)

Case = tuple[str, Tile, dict[str, object], dict[str, object]]

_SHAPE = {"M": 8191, "N": 4096, "K": 4096, "r": 96}
_DROPOUT = {"keep_scale": 1.5, "threshold": 2**31 + 1}


def _expands(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    for case, frozen_product, transposed, dropout in (
        ("forward", True, False, False),
        ("dx", True, True, False),
        ("dx, dropout", True, True, True),
        ("second call, dropout", False, True, True),
    ):
        arguments = {
            **dict.fromkeys(("x_ptr", "weight_ptr"), "*" if frozen_product else None),
            **dict.fromkeys(("p_ptr", "factor_ptr", "y_ptr"), "*"),
            "bias_ptr": None if transposed else "*",
            "seed_ptr": "*i64" if dropout else None,
            **{**_SHAPE, **_DROPOUT, "stride_xm": 4096, "stride_xk": 1},
            "stride_wn": 1 if transposed else 4096,
            "stride_wk": 4096 if transposed else 1,
            "stride_fn": 1 if transposed else 96,
            "stride_fr": 4096 if transposed else 1,
        }
        constants = {
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
                    "p_desc": (rows, EXPAND_BLOCK_R),
                    "y_desc": (rows, columns),
                },
                "weight_desc": (k, columns) if transposed else (columns, k),
                "factor_desc": (EXPAND_BLOCK_R, columns)
                if transposed
                else (columns, EXPAND_BLOCK_R),
                "bias_ptr": None if transposed else "*",
                "seed_ptr": "*i64" if dropout else None,
                **_SHAPE,
                **_DROPOUT,
            }
            constants = {
                **dict.fromkeys(("WEIGHT_TRANSPOSED", "FACTOR_TRANSPOSED"), transposed),
                "BIAS": not transposed,
                "DROPOUT": dropout,
                "BLOCK_R": EXPAND_BLOCK_R,
                "GROUP_M": GROUP_M,
            }
            yield case, tile, arguments, constants


EXPAND_KERNELS = {
    "expand": (expand_kernel, _expands),
    "expand_descriptor": (expand_descriptor_kernel, _descriptor_expands),
}

__all__ = ["EXPAND_KERNELS"]
