"""The checks on emulated PTX; run by `run_checks.py` in a process without interpreter."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.triton.core_backward import core_backward, rank_gradient
from lorasb_kernels.ops.triton.expand import fused_expand, two_call_expand
from lorasb_kernels.ops.triton.expand_descriptor import descriptor_expand
from lorasb_kernels.ops.triton.factor_gradient import factor_gradient
from lorasb_kernels.ops.triton.factor_tiles import factor_splits, factor_tile
from lorasb_kernels.ops.triton.projection import project as shrink
from lorasb_kernels.ops.triton.projection import project_group
from lorasb_kernels.ops.triton.projection_tiles import column_splits, projection_tile
from lorasb_kernels.ops.triton.tiles import (
    ExpandTile,
    expand_tile,
    gradient_tile,
    rank_tiles,
    resident_blocks,
    row_splits,
)
from tests import formulas
from tests.aot.emulator import close, emulated, read_bytes, write_bytes
from tests.contract import assert_within_contract
from tests.ops.operands import (
    as_tuple,
    assert_single_precision,
    dropout_seed,
    eager,
    longest,
    normal,
    oracle,
    same_bits,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SCALING = 0.75


def bf16(*shape, seed=0):
    return normal(*shape, dtype=BF16, device=CPU, seed=seed)


def core_of(r):
    return normal(r, r, dtype=torch.float32, device=CPU, seed=9) / math.sqrt(r)


def compare(operation, outputs, *arguments):
    yardstick, exact = eager(operation, *arguments), oracle(operation, *arguments)
    for out, own, ref in zip(as_tuple(outputs), yardstick, exact, strict=True):
        assert_within_contract(out, own, ref, name=operation)


def shrink_arguments(M, n, r, dropout=0.0):
    seed = dropout_seed(CPU) if dropout else None
    x, lora_A = bf16(M, n), bf16(r, n, seed=1) / math.sqrt(n)
    return x, lora_A, core_of(r), SCALING, dropout, seed


def check_shrink(arch):
    """One block per row tile; odd sizes, scalar loads, dropout; a small n and a rank of 200."""
    for M, n, r, dropout in (
        (75, 208, 96, 0.0),
        (3, 37, 3, 0.0),
        (70, 144, 24, 0.3),
        (20, 72, 200, 0.0),
    ):
        arguments = shrink_arguments(M, n, r, dropout)
        with emulated(arch, multiprocessors=1):
            compare("shrink", shrink(*arguments), *arguments)


def check_shrink_group(arch):
    """Three layers in one launch and a fourth in another, split over n or not."""
    for M, n, r, layers in ((40, 256, 24, 3), (75, 900, 96, 2), (3, 130, 200, 4)):
        x = bf16(M, n)
        As = [bf16(r, n, seed=i) / math.sqrt(n) for i in range(layers)]
        cores = [core_of(r) * (1 + i) for i in range(layers)]
        with emulated(arch) as log:
            h, p = project_group(x, As, cores, SCALING)
        assert len(log) == math.ceil(layers / 3), "three layers in a launch"
        for layer in range(layers):
            arguments = (x, As[layer], cores[layer], SCALING, 0.0, None)
            compare("shrink", (h[layer], p[layer]), *arguments)


def check_split_shrink(arch):
    """The last block to arrive finishes: the same bits under any order of blocks."""
    M, n, r = 75, 912, 96
    arguments = shrink_arguments(M, n, r)
    tile = projection_tile(arch, BF16, r, M, False)
    row_tiles = -(-M // tile.BLOCK_M)
    splits, _ = column_splits(row_tiles, n, r, tile, 8)
    assert splits > 2
    outputs = []
    for options in (
        {},
        {"schedule_seed": 1},
        {"schedule_seed": 2},
        {"schedule_seed": 3},
        {"cp_async": "early"},
    ):
        with emulated(arch, multiprocessors=8, **options) as log:
            outputs.append(shrink(*arguments))
        assert sum(stats.atomic_ops for stats in log) == row_tiles * splits, "one per block"
    compare("shrink", outputs[0], *arguments)
    for other in outputs[1:]:
        assert all(map(same_bits, outputs[0], other))


def check_shrink_mask(arch):
    """The mask is exactly that of the seed."""
    M, n = 40, 64
    seed = dropout_seed(CPU)
    identity = torch.eye(n, dtype=BF16)
    with emulated(arch):
        h, _ = shrink(torch.ones(M, n, dtype=BF16), identity, torch.eye(n), 1.0, 0.4, seed)
    assert torch.equal(h != 0, keep_mask(M, n, 0.4, seed))


def check_shrink_strides(arch):
    """Row offsets beyond 2³¹ elements, transposed A and R, every other row."""
    stride, n, r = 2**30 + 8, 40, 8
    memory = torch.from_numpy(np.zeros(2 * stride + n, dtype=np.int16)).view(BF16)
    x, lora_A, core, *rest = shrink_arguments(3, n, r)
    far = memory.as_strided((3, n), (stride, 1))
    far.copy_(x)
    with emulated(arch):
        near = shrink(x, lora_A, core, *rest)
        assert all(map(same_bits, shrink(far, lora_A, core, *rest), near))
    x, lora_A, core, *rest = shrink_arguments(60, 100, 25)
    arguments = (x[::2, 7:], lora_A[:, 7:].T.contiguous().T, core.T, *rest)
    with emulated(arch):
        compare("shrink", shrink(*arguments), *arguments)


def check_core_backward(arch):
    """q and dR; dR in one part and in several, the same bits under any order of blocks."""
    M, m, r = 150, 208, 96
    arguments = (bf16(M, m), bf16(M, r, seed=1), bf16(m, r, seed=2), core_of(r), SCALING)
    outputs = []
    for options in ({}, {"schedule_seed": 1}, {"cp_async": "early"}):
        with emulated(arch, **options):
            outputs.append(core_backward(*arguments))
    compare("core_backward", outputs[0], *arguments)
    for other in outputs[1:]:
        assert all(map(same_bits, outputs[0], other))

    g, h = bf16(1600, 40), bf16(1600, 40, seed=1)
    assert row_splits(1600, gradient_tile(arch, BF16))[0] > 2, "two parts add up in any order"
    sums = []
    for options in ({}, {"schedule_seed": 1}, {"schedule_seed": 2}):
        with emulated(arch, **options):
            sums.append(rank_gradient(g, h, SCALING))
    exact = SCALING * g.double().T @ h.double()
    assert_within_contract(sums[0], SCALING * g.float().T @ h.float(), exact)
    assert same_bits(sums[0], sums[1])
    assert same_bits(sums[0], sums[2])


def check_factor_gradient(arch):
    """One block per column tile and several, odd sizes, dropout; the bytes."""
    for M, k, r, dropout in ((75, 208, 96, 0.0), (70, 72, 24, 0.3)):
        seed = dropout_seed(CPU) if dropout else None
        arguments = (bf16(M, r, seed=1), bf16(M, k), dropout, seed)
        with emulated(arch, multiprocessors=1):
            compare("factor_gradient", factor_gradient(*arguments), *arguments)

    M, k, r = 800, 40, 24
    assert factor_splits(1, M, r, factor_tile(arch, BF16, r, False), 8)[0] == 2
    arguments = (bf16(M, r, seed=1), bf16(M, k), 0.0, None)
    outputs = []
    for options in ({}, {"schedule_seed": 1, "cp_async": "early"}):
        with emulated(arch, **options):
            outputs.append(factor_gradient(*arguments))
    compare("factor_gradient", outputs[0], *arguments)
    assert same_bits(outputs[0], outputs[1])

    M, k, r = 128, 256, 64
    tile = factor_tile(arch, BF16, r, False)
    with emulated(arch, multiprocessors=1) as log:
        factor_gradient(bf16(M, r, seed=1), bf16(M, k), 0.0, None)
    assert close(read_bytes(log), 2 * M * k + 2 * M * r * (k // tile.BLOCK_N)), "rows once"
    assert write_bytes(log) == 4 * r * k


def check_factor_gradient_strides(arch):
    """Row offsets beyond 2³¹ elements; every other row of a wider matrix; a rank of 200."""
    stride, k, r = 2**30 + 8, 40, 8
    memory = torch.from_numpy(np.zeros(2 * stride + k, dtype=np.int16)).view(BF16)
    left, rows = bf16(3, r, seed=1), bf16(3, k)
    far = memory.as_strided((3, k), (stride, 1))
    far.copy_(rows)
    with emulated(arch):
        near = factor_gradient(left, rows, 0.0, None)
        assert same_bits(factor_gradient(left, far, 0.0, None), near)
    for arguments in (
        (bf16(20, 40, seed=1)[::2, 15:], bf16(20, 50)[::2, 7:], 0.0, None),
        (bf16(20, 200, seed=1), bf16(20, 40), 0.0, None),
    ):
        with emulated(arch):
            compare("factor_gradient", factor_gradient(*arguments), *arguments)


def expand_arguments(M, N, K, r, transposed, dropout):
    weight, factor = bf16(N, K, seed=1) / math.sqrt(K), bf16(N, r, seed=3) / math.sqrt(r)
    if transposed:
        weight, factor = weight.T.contiguous().T, factor.T.contiguous().T
    bias = None if transposed else bf16(N, seed=4)
    seed = dropout_seed(CPU) if dropout else None
    return bf16(M, K), weight, bf16(M, r, seed=2), factor, bias, dropout, seed


def check_expand(arch):
    """Forward and dx, even and odd, with and without the mask; both routes."""
    for M, N, K, r, transposed, dropout in (
        (150, 144, 208, 96, False, 0.0),
        (33, 37, 35, 25, False, 0.0),
        (150, 144, 208, 96, True, 0.0),
        (70, 136, 72, 24, True, 0.3),
    ):
        arguments = expand_arguments(M, N, K, r, transposed, dropout)
        tile = expand_tile(arch, BF16, dropout > 0)
        with emulated(arch) as log:
            y = fused_expand(*arguments, tile)
        compare("expand", y, *arguments)
        in_flight = log[0].count("cp.async.c") > 0
        assert in_flight == (K % 8 == 0), "rows of 8 elements are copied asynchronously"
        with emulated(arch):
            compare("expand", two_call_expand(*arguments, tile), *arguments)
        with emulated(arch, schedule_seed=1, cp_async="early"):
            assert same_bits(y, fused_expand(*arguments, tile))


def check_expand_descriptor(arch):
    """By tensor maps on sm_90, which Triton turns into pointers for sm_86; three orientations.

    On one multiprocessor a block takes several tiles, whose loops are one.
    """
    tile = ExpandTile(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    forward = expand_arguments(200, 136, 200, 40, False, 0.0)
    assert resident_blocks(tile, BF16, arch, 1) < 4 * 3, "fewer blocks than tiles"
    dx = expand_arguments(200, 136, 72, 24, True, 0.0)
    masked = expand_arguments(70, 136, 72, 24, True, 0.3)
    x, weight, p, factor, *rest = dx
    for arguments in (forward, dx, masked, (x, weight, p, factor.contiguous(), *rest)):
        with emulated(arch, multiprocessors=1) as log:
            y = descriptor_expand(*arguments, tile)
        compare("expand", y, *arguments)
        assert write_bytes(log) == y.nbytes
        assert (log[0].count("cp.async.bulk.tensor") > 0) == (arch == "sm_90")
        for options in ({"schedule_seed": 1}, {"schedule_seed": 2}, {"cp_async": "early"}):
            with emulated(arch, multiprocessors=8, **options):
                assert same_bits(y, descriptor_expand(*arguments, tile))


def check_fp16(arch):
    """The tensor cores' other 16-bit type, in every product."""
    M, n, r = 75, 208, 32
    x, lora_A, core, *rest = shrink_arguments(M, n, r)
    arguments = (x.half(), lora_A.half(), core, *rest)
    with emulated(arch):
        compare("shrink", shrink(*arguments), *arguments)
    h, lora_B = bf16(M, r, seed=1).half(), bf16(n, r, seed=2).half()
    arguments = (x.half(), h, lora_B, core, SCALING)
    with emulated(arch):
        compare("core_backward", core_backward(*arguments), *arguments)
    arguments = expand_arguments(M, 144, n, r, True, 0.3)
    arguments = tuple(t.half() if getattr(t, "dtype", None) is BF16 else t for t in arguments)
    tile = expand_tile(arch, torch.float16, True)
    with emulated(arch):
        compare("expand", fused_expand(*arguments, tile), *arguments)


def check_single_precision(arch):
    """fp32 operands as three tf32 products keep the contract; one product would not."""
    M, n, r = 40, 136, 16
    x, weight, factor = (
        normal(*shape, dtype=torch.float32, device=CPU, seed=seed)
        for seed, shape in enumerate([(M, n), (72, n), (n, r)])
    )
    p, tile = x[:, :r].contiguous(), expand_tile(arch, torch.float32, False)
    for name, function, arguments in (
        ("expand", partial(fused_expand, tile=tile), (x, weight, p, factor[:72], None, 0.0, None)),
        ("core_backward", core_backward, (x, p, factor, core_of(r), SCALING)),
    ):
        with emulated(arch):
            outputs = as_tuple(function(*arguments))
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            coarse = as_tuple(function(*arguments))
            torch.backends.cuda.matmul.fp32_precision = "none"
        magnitudes = formulas.magnitudes(getattr(formulas, name), *arguments)
        judged = zip(outputs, coarse, oracle(name, *arguments), magnitudes, strict=True)
        for out, one_product, ref, magnitude in judged:
            assert_single_precision(out, ref, magnitude, longest(arguments))
            with pytest.raises(AssertionError, match="an element is off"):
                assert_single_precision(one_product, ref, magnitude, longest(arguments))


def check_bytes(arch):
    """Requested global bytes: x, dy once, h, p, q, g, y written once; A, B, W once per tile."""
    M, n, r = 256, 512, 96
    row_tiles = M // projection_tile(arch, BF16, r, M, False).BLOCK_M
    x, lora_A, core, *rest = shrink_arguments(M, n, r)
    with emulated(arch, multiprocessors=1) as log:
        shrink(x, lora_A, core, *rest)
    small = row_tiles * 2 * n * r + row_tiles * 4 * r * r
    assert close(read_bytes(log), 2 * M * n + small)
    assert close(read_bytes(log) - small, 2 * M * n), "x is read once"
    assert write_bytes(log) == 2 * 2 * M * r

    h, lora_B = bf16(M, r), bf16(n, r)
    with emulated(arch, multiprocessors=1) as log:
        core_backward(x, h, lora_B, core, SCALING)
    project, gradient = log
    assert close(project.global_read_bytes - small, 2 * M * n), "dy is read once"
    assert project.global_write_bytes == 2 * 2 * M * r
    assert close(gradient.global_read_bytes, rank_tiles(r)[1] * 2 * 2 * M * r)
    assert gradient.global_write_bytes == 4 * r * r

    N = 256
    tile = expand_tile(arch, BF16, False)
    arguments = expand_arguments(M, N, n, r, False, 0.0)
    with emulated(arch) as log:
        fused_expand(*arguments, tile)
    reads = 2 * (n + r) * (M * (N // tile.BLOCK_N) + N * (M // tile.BLOCK_M))
    assert close(read_bytes(log), reads)
    assert write_bytes(log) == 2 * M * N
