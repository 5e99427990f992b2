"""The variants of the experts' kernels that `report` compiles: 128 experts, many tokens."""

from collections.abc import Iterator

import torch

from bench.kernel_resources.expand_cases import Case
from lorasb_kernels.ops.triton.experts import core_backward, expand, projection
from lorasb_kernels.ops.triton.experts.segments import segments_block
from lorasb_kernels.ops.triton.parts import GROUP_M, in_units
from lorasb_kernels.ops.triton.projection_tiles import projection_tile
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_BLOCK_R,
    expand_tile,
    gradient_tile,
    rank_tiles,
)

M, E, N, K = 32_767, 128, 1536, 2048  # 8 experts of 128 for each of 4096 tokens of Qwen3-MoE
_DROPOUT = {"keep_scale": 1.5, "threshold": 2**31 + 1}
_FACTOR = ("stride_ar", "stride_an")
_EXPAND_NUMBERS = ("N", "K", "r", "stride_xm", "stride_wn", "stride_wk", "stride_fn", "stride_fr")


def _projections(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    for r in (16, 32, 64, 96, 128, 256, 512):
        width, tiles = rank_tiles(r)
        for dropout in (False, True):
            numbers, units = zip(*map(in_units, (K, r, K, K, 1)), strict=True)
            arguments = {
                **dict.fromkeys(("x_ptr", "a_ptr", "h_ptr", "p_ptr"), "*"),
                "r_ptr": "*fp32",
                "offsets_ptr": "*i32",
                "seed_ptr": "*i64" if dropout else None,
                "M": M,
                "E": E,
                **dict(zip(("n", "r", "stride_xm", *_FACTOR), numbers, strict=True)),
                "stride_ae": r * K,
                "stride_re": r * r,
                "stride_rj": r,
                "stride_ri": 1,
                "scaling": 0.5,
                **_DROPOUT,
            }
            constants = {
                **dict(zip(projection.UNITS, units, strict=True)),
                "DROPOUT": dropout,
                "SEGMENTS": segments_block(E),
                "RANK_TILES": tiles,
                "BLOCK_R": width,
            }
            tile = projection_tile(arch, dtype, r, M, dropout)
            yield f"r={r}" + (", dropout" if dropout else ""), tile, arguments, constants


def _expands(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    for case, transposed, dropout in (
        ("forward", False, False),
        ("dx", True, False),
        ("dx, dropout", True, True),
    ):
        n, k, r = (K, N, 96) if transposed else (N, K, 96)
        strides = (k, 1, n, 1, n) if transposed else (k, k, 1, r, 1)
        numbers, units = zip(*map(in_units, (n, k, r, *strides)), strict=True)
        arguments = {
            **dict.fromkeys(("x_ptr", "weight_ptr", "p_ptr", "factor_ptr", "y_ptr"), "*"),
            "bias_ptr": None if transposed else "*",
            "offsets_ptr": "*i32",
            "seed_ptr": "*i64" if dropout else None,
            "M": M,
            "E": E,
            **dict(zip(_EXPAND_NUMBERS, numbers, strict=True)),
            "stride_we": N * K,
            "stride_fe": n * r,
            **_DROPOUT,
        }
        constants = {
            **dict(zip(expand.UNITS, units, strict=True)),
            "BIAS": not transposed,
            "DROPOUT": dropout,
            "SEGMENTS": segments_block(E),
            "BLOCK_R": EXPAND_BLOCK_R,
            "GROUP_M": GROUP_M,
        }
        yield case, expand_tile(arch, dtype, dropout), arguments, constants


def _gradients(arch: str, dtype: torch.dtype) -> Iterator[Case]:
    tile = gradient_tile(arch, dtype)
    for r in (16, 96, 128):
        width, _ = rank_tiles(r)
        arguments = {
            **dict.fromkeys(("g_ptr", "h_ptr"), "*"),
            **dict.fromkeys(("dR_ptr", "partial_ptr"), "*fp32"),
            **dict.fromkeys(("arrived_ptr", "offsets_ptr"), "*i32"),
            "M": M,
            "E": E,
            "r": r,
            "scaling": 0.5,
        }
        constants = {
            "SEGMENTS": segments_block(E),
            "CHUNK": core_backward.STEPS * tile.BLOCK_M,
            "BLOCK_R": width,
        }
        yield f"width={width}", tile, arguments, constants


EXPERTS_KERNELS = {
    "experts_projection": (projection.experts_projection_kernel, _projections),
    "experts_expand": (expand.experts_expand_kernel, _expands),
    "experts_gradient": (core_backward.experts_gradient_kernel, _gradients),
}

__all__ = ["EXPERTS_KERNELS"]
