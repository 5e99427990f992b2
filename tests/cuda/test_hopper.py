"""The kernel of `expand` for Hopper, executed as sm_90a PTX: wgmma, TMA, mbarriers, clusters.

Operands go through the operator's own bindings and launcher; the simulated device reports
capability 9.0. One test per width of tiles, orientation and dtype is quick; the rest is slow.
"""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.triton.expand import RUN
from tests.cuda.test_operators import (
    BF16,
    CPU,
    FP16,
    FP32,
    SEED,
    check,
    expand_operands,
    normal,
    run,
)
from tests.ops.operands import same_bits

HOPPER = (9, 0)
WIDE, NARROW = 256, 128


def padded(tensor):
    """The same values in rows at multiples of 16 bytes, with NaN between them."""
    rows, columns = tensor.shape
    memory = torch.full((rows, -(-columns // 8) * 8), math.nan, dtype=tensor.dtype)
    view = memory[:, :columns]
    view.copy_(tensor)
    return view


def operands(M, N, K, r, dtype, transposed):
    """Like `expand_operands`, with rows of x and weight at multiples of 16 bytes for any K."""
    x, weight, p, factor = expand_operands(M, N, K, r, dtype, transposed)
    return padded(x), weight if transposed else padded(weight), p, factor


def taken(launch) -> int | None:
    """Columns of the tiles of the Hopper kernel; None for another kernel."""
    found = re.search(r"hopper_expand_kernel.*Lb[01]ELi(\d+)E", launch.kernel)
    return int(found[1]) if found else None


# Multiprocessors decide how many clusters share the tiles, and with their number the width.
SHAPES = {
    "two tiles of x, tails in all dimensions": (300, 328, 130, 96, 2, NARROW),
    "one wide tile": (77, 256, 64, 8, 2, WIDE),
    "a padded rank in one cluster": (257, 264, 72, 25, 2, NARROW),
    "a rank of four chunks in two clusters": (513, 496, 136, 200, 4, WIDE),
}
MORE_SHAPES = {
    "eight columns": (513, 8, 136, 24, 2, NARROW),
    "one row": (1, 256, 200, 48, 2, WIDE),
    "more tiles than one group of eight rows": (2400, 264, 64, 16, 2, NARROW),
    "more chunks than twice the stages": (129, 256, 1000, 72, 2, WIDE),
    "three clusters": (600, 520, 72, 40, 6, NARROW),
}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE_SHAPES)]
)
def test_expand(shape, transposed, dtype, simulator):
    M, N, K, r, multiprocessors, width = (SHAPES | MORE_SHAPES)[shape]
    device = {"capability": HOPPER, "multiprocessors": multiprocessors, "check_overlap": True}
    arguments = operands(M, N, K, r, dtype, transposed)
    bias = normal(N, dtype=dtype, device=CPU, seed=4)
    dropped = (None, 0.3, SEED) if transposed else (bias, 0.0, None)
    for rest in (dropped,) if shape in SHAPES else ((bias, 0.3, SEED), (None, 0.0, None)):
        (launch,) = check(simulator, "expand", *arguments, *rest, **device)
        assert taken(launch) == width
        assert launch.grid[0] % 2 == 0
        assert launch.grid[0] <= multiprocessors
        assert not launch.stats.notes


@pytest.mark.parametrize("transposed", [False, True])
def test_any_schedule_gives_the_same_bits(transposed, simulator):
    """Blocks and warps in other orders, copies that arrive at once or as late as they may."""
    arguments = (*operands(300, 136, 72, 24, BF16, transposed), None, 0.3, SEED)
    device = {"capability": HOPPER, "multiprocessors": 4}
    first, _ = run(simulator, "expand", *arguments, **device)
    for options in ({"schedule_seed": 1}, {"cp_async": "early"}, {"cp_async": "late"}):
        again, _ = run(simulator, "expand", *arguments, **device, **options)
        assert same_bits(first[0], again[0]), options


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_more_schedules_give_the_same_bits(transposed, dropout, simulator):
    seed = SEED if dropout else None
    arguments = (*operands(391, 520, 200, 200, FP16, transposed), None, dropout, seed)
    device = {"capability": HOPPER, "multiprocessors": 4}
    first, _ = run(simulator, "expand", *arguments, **device)
    for number, copies in itertools.product(range(2, 7), ("early", "late")):
        options = {"schedule_seed": number, "cp_async": copies}
        again, _ = run(simulator, "expand", *arguments, **device, **options)
        assert same_bits(first[0], again[0]), options


@pytest.mark.parametrize("N", [136, 256])
def test_the_mask_is_that_of_the_seed_bit_for_bit(N, simulator):
    M = 200
    zeros = torch.zeros(M, 8, dtype=BF16), torch.zeros(N, 8, dtype=BF16)
    ones = torch.ones(M, 8, dtype=BF16), torch.ones(N, 8, dtype=BF16)
    (y,), (launch,) = run(simulator, "expand", *zeros, *ones, None, 0.4, SEED, capability=HOPPER)
    assert taken(launch)
    assert torch.equal(y != 0, keep_mask(M, N, 0.4, SEED))


def test_products_and_bytes_are_those_of_the_rank_in_sixteens(simulator):
    """A rank of 24 costs 32; each tile of W is read once per cluster, not per block."""
    M, N, K, r = 512, 256, 128, 24
    arguments = (*operands(M, N, K, r, BF16, False), None, 0.0, None)
    _, (launch,) = run(simulator, "expand", *arguments, capability=HOPPER)
    assert launch.stats.mma_flops() == 2 * M * N * (K + 32)
    clusters_of_rows = M // 256
    assert launch.stats.global_read_bytes == 2 * (M + N * clusters_of_rows) * (K + r)
    assert launch.stats.global_write_bytes == 2 * M * N


def test_rows_beyond_32_bits(simulator):
    stride = 2**31 + 8
    small = expand_operands(2, 8, 40, 8, FP16)
    memory = torch.from_numpy(np.zeros(stride + 40, dtype=np.float16))
    far = memory.as_strided((2, 40), (stride, 1))  # untouched pages cost nothing
    far.copy_(small[0])
    near, _ = run(simulator, "expand", *small, None, 0.0, None, capability=HOPPER)
    (y,), (launch,) = run(simulator, "expand", far, *small[1:], None, 0.0, None, capability=HOPPER)
    assert taken(launch)
    assert same_bits(y, near[0])


def test_non_finite_rows_stay_in_their_rows(simulator):
    arguments = operands(150, 136, 72, 24, BF16, False)
    clean, _ = run(simulator, "expand", *arguments, None, 0.0, None, capability=HOPPER)
    arguments[0][149, 71] = math.inf
    (y,), _ = run(simulator, "expand", *arguments, None, 0.0, None, capability=HOPPER)
    assert not y[149].isfinite().any()
    assert same_bits(y[:149], clean[0][:149])


EIGHT = {"bias": None, "dtype": BF16, "capability": HOPPER}
OTHERWISE = {
    "another architecture": {"capability": (8, 6)},
    "a later architecture": {"capability": (10, 0)},
    "a later minor version": {"capability": (9, 3)},
    "single precision": {"dtype": FP32},
    "columns that are no multiple of 8": {"N": 20},
    "an x of one row repeated": {"x": lambda x: x[:1, 8:].expand(x.shape[0], -1)},
    "no contraction": {"x": lambda x: x[:, :0], "weight": lambda weight: weight[:, :0]},
    "a bias at an odd element": {"bias": torch.ones(17, dtype=BF16)[1:]},
}


@pytest.mark.parametrize("reason", OTHERWISE)
def test_other_operands_and_devices_take_the_other_kernel(reason, simulator):
    change = EIGHT | {"N": 16} | OTHERWISE[reason]
    M, N, K, r = 20, change["N"], 32, 8
    x, weight, p, factor = expand_operands(M, N, K + 8, r, change["dtype"])
    cut = {"x": lambda x: x[:, 8:], "weight": lambda weight: weight[:, 8:]} | change
    arguments = (cut["x"](x), cut["weight"](weight), p, factor, change["bias"], 0.0, None)
    device = {"capability": change["capability"]}
    (launch,) = check(simulator, "expand", *arguments, **device)
    assert taken(launch) is None
    arguments = (x, weight, p, factor, None, 0.0, None)
    (launch,) = check(simulator, "expand", *arguments, **device)
    changed = {"N", "dtype", "capability"} & set(OTHERWISE[reason])
    assert (taken(launch) is None) == bool(changed), "the change alone decides"


def test_the_route_of_triton_s_backend(simulator):
    """The same launch as the operator's; the tile of the route is ignored."""
    arguments = (*operands(77, 136, 72, 24, BF16, True), None, 0.3, SEED)
    with simulator.running(capability=HOPPER) as launches:
        y = RUN["dual"](*arguments, None)
    assert [taken(launch) for launch in launches] == [WIDE]
    assert same_bits(y, run(simulator, "expand", *arguments, capability=HOPPER)[0][0])


def test_no_rows(simulator):
    arguments = operands(0, 16, 32, 8, BF16, False)
    (y,), launches = run(simulator, "expand", *arguments, None, 0.0, None, capability=HOPPER)
    assert y.shape == (0, 16)
    assert launches == []


def test_a_failed_launch_names_the_kernel(simulator):
    arguments = (*operands(20, 16, 32, 8, BF16, False), None, 0.0, None)
    message = r"CUDA kernel hopper_expand failed to launch: launch failure \(grid 2×1×1"
    with (
        simulator.running(refuse=True, capability=HOPPER),
        pytest.raises(RuntimeError, match=message),
    ):
        torch.ops.lorasb.expand_cuda(*arguments)
